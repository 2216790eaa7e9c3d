// SPDX-License-Identifier: MIT
// Coming into a program that runs, and going out of one: the agent's side of `udedup attach` and `udedup detach`. See
// common/attach.h for who does what.
#ifndef UDD_AGENT_ATTACH_H
#define UDD_AGENT_ATTACH_H

#include <stdbool.h>

#include "../common/attach.h"

// Whether this library was loaded by `udedup attach`, which does the rest itself.
bool udd_loaded_by_attach(void);

// ---- for the worker ----

// Returns when the functions are redirected, if that is what has to be waited for.
void udd_attach_wait(void);
// For who has attached: how far it is.
void udd_attach_tell(enum udd_attach_state state);
// Whether it is to leave; and that it could not.
bool udd_attach_is_leaving(void);
void udd_attach_stay(void);
// Sleeps for so long, but not on when it is to leave.
void udd_attach_nap(uint64_t milliseconds);
// Nothing is left to be done until somebody attaches again, and has redirected the functions. `state`: UDD_ATTACH_LEFT or
// UDD_ATTACH_REFUSED; `clean`: the hooks can be taken out meanwhile.
void udd_attach_park(enum udd_attach_state state, bool clean);

#endif
