// SPDX-License-Identifier: MIT
#include "patch.h"

#include <errno.h>
#include <linux/membarrier.h>
#include <string.h>
#include <sys/mman.h>

#include "sys.h"
#include "util.h"

enum {
	JUMP_BYTES = 5,       // jmp rel32
	STUB_BYTES = 64,      // a far jump to the hook, or a trampoline
	AREA_BYTES = 4096,
	SEARCH_STEP = 1 << 20,
	SEARCH_STEPS = 1024,  // within 1 GiB, so within reach of a rel32
};

static unsigned char *area; // stubs and trampolines
static size_t area_used;

int udd_patch_init(const void *near)
{
	uint64_t around = udd_page_down((uint64_t)(uintptr_t)near);

	for (int step = 1; step <= SEARCH_STEPS; step++) {
		for (int side = -1; side <= 1; side += 2) {
			uint64_t wanted = around + (uint64_t)((int64_t)side * step * SEARCH_STEP);
			long ret = udd_sys(SYS_mmap, wanted, AREA_BYTES, PROT_READ | PROT_WRITE,
					   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);

			if (!udd_failed(ret)) {
				area = udd_pointer((uint64_t)ret);
				return 0;
			}
		}
	}
	return -ENOMEM;
}

static void emit_far_jump(unsigned char *at, const void *target)
{
	static const unsigned char code[] = {0xff, 0x25, 0, 0, 0, 0};

	memcpy(at, code, sizeof(code));
	memcpy(at + sizeof(code), &target, sizeof(target));
}

// Length of an instruction that means the same at any address, 0 for every other. These are the kinds that compilers
// put at the entry of small functions.
static size_t movable_length(const unsigned char *code)
{
	static const struct {
		unsigned char bytes[5];
		unsigned char known;  // bytes that must match
		unsigned char length; // whole instruction
	} kinds[] = {
		{{0xf3, 0x0f, 0x1e, 0xfa}, 4, 4},             // endbr64
		{{0x64, 0x48, 0x8b, 0x04, 0x25}, 5, 9},       // mov %fs:abs32, %rax
		{{0x48, 0xc7, 0xc0}, 3, 7},                   // mov $imm32, %rax
		{{0x48, 0x83, 0xec}, 3, 4},                   // sub $imm8, %rsp
		{{0x48, 0x81, 0xec}, 3, 7},                   // sub $imm32, %rsp
		{{0x48, 0x85, 0xff}, 3, 3},                   // test %rdi, %rdi
		{{0x48, 0x89, 0xe5}, 3, 3},                   // mov %rsp, %rbp
		{{0x8d, 0x47}, 2, 3},                         // lea disp8(%rdi), %eax
		{{0x83, 0xf8}, 2, 3},                         // cmp $imm8, %eax
	};

	for (size_t i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++) {
		if (memcmp(code, kinds[i].bytes, kinds[i].known) == 0)
			return kinds[i].length;
	}
	if (code[0] >= 0x50 && code[0] <= 0x57) // push %r64
		return 1;
	if (code[0] == 0x41 && code[1] >= 0x50 && code[1] <= 0x57) // push %r8…%r15
		return 2;
	if (code[0] >= 0xb8 && code[0] <= 0xbf) // mov $imm32, %r32
		return 5;
	if (code[0] == 0x31 && code[1] >= 0xc0) // xor %r32, %r32
		return 2;
	return 0;
}

static int emit_trampoline(unsigned char *at, unsigned char *function)
{
	size_t length = 0;

	while (length < JUMP_BYTES) {
		size_t more = movable_length(function + length);

		if (!more)
			return -ENOTSUP;
		length += more;
	}
	memcpy(at, function, length);
	emit_far_jump(at + length, function + length);
	return 0;
}

static unsigned char *take_stub(void)
{
	unsigned char *stub = area + area_used;

	if (!area || area_used + STUB_BYTES > AREA_BYTES)
		return NULL;
	area_used += STUB_BYTES;
	return stub;
}

int udd_patch_prepare(void *function, const void *hook, void **original, struct udd_patch *ret)
{
	unsigned char *stub = take_stub();
	int32_t distance;

	*ret = (struct udd_patch){0};
	// One aligned word is written at once, so that a thread sees the old entry or the new one.
	if (!stub || (uintptr_t)function % sizeof(ret->word))
		return -ENOTSUP;
	emit_far_jump(stub, hook);
	distance = (int32_t)(stub - ((unsigned char *)function + JUMP_BYTES));
	if (original) {
		unsigned char *trampoline = take_stub();
		int error = trampoline ? emit_trampoline(trampoline, function) : -ENOTSUP;

		if (error)
			return error;
		*original = trampoline;
	}
	memcpy(&ret->before, function, sizeof(ret->before));
	ret->word = ret->before;
	((unsigned char *)&ret->word)[0] = 0xe9;
	memcpy((unsigned char *)&ret->word + 1, &distance, sizeof(distance));
	ret->entry = function;
	return 0;
}

int udd_patch_seal(void)
{
	return (int)udd_sys(SYS_mprotect, area, AREA_BYTES, PROT_READ | PROT_EXEC);
}

int udd_patch_apply(const struct udd_patch *patch)
{
	uint64_t page = udd_page_down((uint64_t)(uintptr_t)patch->entry);
	long ret;

	if (!patch->entry)
		return 0;
	ret = udd_sys(SYS_mprotect, page, UDD_PAGE_SIZE, PROT_READ | PROT_WRITE | PROT_EXEC);
	if (udd_failed(ret))
		return (int)ret;
	__atomic_store_n(patch->entry, patch->word, __ATOMIC_SEQ_CST);
	udd_sys(SYS_mprotect, page, UDD_PAGE_SIZE, PROT_READ | PROT_EXEC);
	return 0;
}

void udd_patch_done(void)
{
	// Only a process with threads needs it, and a kernel without it has had no trouble with this either.
	if (!udd_failed(udd_sys(SYS_membarrier, MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED_SYNC_CORE, 0, 0)))
		udd_sys(SYS_membarrier, MEMBARRIER_CMD_PRIVATE_EXPEDITED_SYNC_CORE, 0, 0);
}
