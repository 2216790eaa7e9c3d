// SPDX-License-Identifier: MIT
// What memory the kernel still gives this process. It may refuse every further page: with vm.overcommit_memory=2, when all is
// promised, and when the process has limited itself to less than it has (RLIMIT_AS, RLIMIT_DATA). mremap() refuses after it has
// unmapped what it was to replace, and the program's page would be gone. So merged pages are then broken by the kernel's
// own copy-on-write, whose copies were promised when the store was mapped. Before Linux 6.12 mmap() over a mapping is like that,
// too, with the first of the two; so where the kernel is strict it is asked for as much beforehand.
//
// All under the map lock held exclusively, for which whoever changes the limits waits, unless that is another process, or past the
// hooks.
#ifndef UDD_COMMIT_H
#define UDD_COMMIT_H

#include <stdbool.h>
#include <stdint.h>

// Opens the setting, for the agent's threads. Until it is looked at, and where it can't be read, the kernel is taken for strict.
void udd_commit_open(void);
// Looks how things are, for the time that the lock is held exclusively. Threads of the agent only.
void udd_commit_look(void);
// Only at the system's setting, for those who find out about the limits by themselves. `now`: ns
void udd_commit_look_at_mode(uint64_t now);
// Whether the kernel was strict at the last look; any thread.
bool udd_commit_strict(void);
// Whether there is room for UDD_STAGING_PAGES more.
bool udd_commit_has_room(void);
// Whether the application's threads, which have not looked, may count on the kernel: it was not strict, and there is room now.
bool udd_commit_allows(void);

#endif
