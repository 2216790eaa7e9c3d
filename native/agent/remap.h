// SPDX-License-Identifier: MIT
// mremap for memory that merging has cut in several mappings: the kernel works on one. Done step by step, without copying a
// page, so that even memory pinned by a device goes along. Under the map lock held exclusively, on an application's thread.
#ifndef UDD_REMAP_H
#define UDD_REMAP_H

#include "util.h"

// What mremap(2) returns for `arguments` (its five, in order), or a negative errno. `from` is the old range, `to` the new
// one if MREMAP_FIXED says so, else empty.
long udd_remap(struct udd_span from, struct udd_span to, const long *arguments);

#endif
