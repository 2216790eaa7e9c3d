// SPDX-License-Identifier: MIT
// What the kernel promises (vm.overcommit_memory). With 2, strict, it may refuse a process every further page, and mremap() does so
// after it has unmapped what it was to replace: the program's page would be gone. So merged pages are then broken by the
// kernel's own copy-on-write, whose copies were promised when the store was mapped.
#ifndef UDD_COMMIT_H
#define UDD_COMMIT_H

#include <stdbool.h>
#include <stdint.h>

// Opens the setting, for the agent's threads. Where it can't be read, it is taken for strict.
void udd_commit_open(void);
// Looks at the setting, unless that was done just now. Threads of the agent only.
void udd_commit_look(void);
// Whether it was strict at the last look; any thread.
bool udd_commit_strict(void);
// Whether the application's threads, which have not looked, may count on the kernel for so many bytes: it was not strict, and
// has them now.
bool udd_commit_allows(uint64_t bytes);

#endif
