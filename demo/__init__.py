"""The main job: ordinary programs and a disk image share memory, and every byte is checked at the end."""
