"""Records, from outside, what merging does to a set of processes, whoever merges: udedup or the kernel's KSM.

:func:`udedup.record.recorder.recording` writes a Parquet file, :class:`udedup.record.recording.Recording` reads it,
``plots`` and ``page`` show it. Takes root, and the extra ``record`` (pyarrow, matplotlib).
"""
