// SPDX-License-Identifier: MIT
// Which instructions may move to a trampoline, and what a patched function does. The assembler says how long an instruction
// is; patch.c is included for the one function that it keeps to itself.
#include "agent/patch.c"
#include "unit.h"

// One instruction between labels a##n and b##n.
#define CASE(n, text) __asm__(".pushsection .rodata\n.globl a" #n ", b" #n "\na" #n ": " text "\nb" #n ":\n.fill 16, 1, 0xcc\n.popsection\n")
#define LENGTH(n)                                                                                                      \
	do {                                                                                                           \
		extern const unsigned char a##n[], b##n[];                                                             \
		check(movable_length(a##n) == (size_t)(b##n - a##n));                                                  \
	} while (0)
#define REFUSED(n)                                                                                                     \
	do {                                                                                                           \
		extern const unsigned char a##n[];                                                                     \
		check(movable_length(a##n) == 0);                                                                      \
	} while (0)

CASE(1, "endbr64");
CASE(2, "mov %fs:0x10, %rax");
CASE(3, "mov $-38, %rax");
CASE(4, "sub $0x18, %rsp");
CASE(5, "sub $0x1018, %rsp");
CASE(6, "test %rdi, %rdi");
CASE(7, "mov %rsp, %rbp");
CASE(8, "push %rax");
CASE(9, "push %rbp");
CASE(10, "push %r8");
CASE(11, "push %r15");
CASE(12, "mov $9, %eax");
CASE(13, "mov $0x12345678, %edi");
CASE(14, "xor %eax, %eax");
CASE(16, "lea -1(%rdi), %eax");
CASE(17, "cmp $0x3f, %eax");
CASE(15, "xor %r10d, %eax"); // with a prefix

// Relative to where they are, or longer than they look.
CASE(30, "jmp .+20");
CASE(31, ".byte 0xe9, 1, 2, 3, 4"); // jmp rel32
CASE(32, ".byte 0xe8, 1, 2, 3, 4"); // call rel32
CASE(33, ".byte 0x0f, 0x84, 1, 2, 3, 4"); // je rel32
CASE(34, "je .+10");
CASE(35, "lea 100(%rip), %rax");
CASE(36, "mov 100(%rip), %rax");
CASE(37, "mov 100(%rip), %eax");
CASE(38, "cmpb $0, 100(%rip)");
CASE(39, "cmpl $0, 100(%rip)");
CASE(40, "xor %eax, 100(%rip)"); // 31 05: looks like xor of registers but for its second byte
CASE(41, "xor %eax, (%rdi)");
CASE(42, "xor %eax, 127(%rdi)");
CASE(43, "ret");
CASE(44, "syscall");
CASE(45, "loop .+2");
CASE(46, "jrcxz .+2");
CASE(47, "movabs $0x1122334455667788, %rax");
CASE(48, "call *%rax");
CASE(49, "jmp *100(%rip)");
CASE(50, "int3");
CASE(51, "pop %rax");
CASE(52, "push $5");
CASE(53, "notrack jmp *%rax");
CASE(54, "mov %fs:(%rax), %rax");
CASE(55, "sub $0x18, %rax");
CASE(56, "mov $9, %ax"); // the operand-size prefix makes it shorter
CASE(57, "mov $9, %r8d");
CASE(58, "lea 100(%rip), %eax");
CASE(59, "lea -1(%rdi, %rsi), %eax");
CASE(60, "cmp $0x3ff, %eax");

static void instruction_lengths(void)
{
	LENGTH(1);
	LENGTH(2);
	LENGTH(3);
	LENGTH(4);
	LENGTH(5);
	LENGTH(6);
	LENGTH(7);
	LENGTH(8);
	LENGTH(9);
	LENGTH(10);
	LENGTH(11);
	LENGTH(12);
	LENGTH(13);
	LENGTH(14);
	LENGTH(16);
	LENGTH(17);
	REFUSED(15);
	REFUSED(30);
	REFUSED(31);
	REFUSED(32);
	REFUSED(33);
	REFUSED(34);
	REFUSED(35);
	REFUSED(36);
	REFUSED(37);
	REFUSED(38);
	REFUSED(39);
	REFUSED(40);
	REFUSED(41);
	REFUSED(42);
	REFUSED(43);
	REFUSED(44);
	REFUSED(45);
	REFUSED(46);
	REFUSED(47);
	REFUSED(48);
	REFUSED(49);
	REFUSED(50);
	REFUSED(51);
	REFUSED(52);
	REFUSED(53);
	REFUSED(54);
	REFUSED(55);
	REFUSED(56);
	REFUSED(57);
	REFUSED(58);
	REFUSED(59);
	REFUSED(60);
}

// Functions to patch: each gives back what tells it from the others.
__asm__(".text\n.balign 4096\n"
	".globl movable, stuck, crooked, small\n"
	"movable: endbr64\n push %rbp\n mov $41, %eax\n mov %rsp, %rbp\n pop %rbp\n add %edi, %eax\n ret\n"
	".balign 16\n"
	"stuck: mov stuck_value(%rip), %eax\n add %edi, %eax\n ret\n"
	".balign 16\n nop\n"
	"crooked: mov $43, %eax\n add %edi, %eax\n ret\n"
	".balign 16\n"
	"small: xor %eax, %eax\n sub $8, %rsp\n add $8, %rsp\n lea 44(%rdi), %eax\n ret\n"
	".balign 4096\n"
	".section .rodata\n stuck_value: .long 42\n.text\n");

typedef int function(int);
extern function movable, stuck, crooked, small;

static int hook(int value)
{
	return 1000 + value;
}

static void original_unchanged(unsigned char *at, const unsigned char *before, function *call, int result)
{
	check(memcmp(at, before, 16) == 0);
	check(call(0) == result);
}

static char permission_of(const void *address, int which)
{
	FILE *maps = fopen("/proc/self/maps", "r");
	unsigned long start, end;
	char permissions[5];
	char found = '?';

	while (fscanf(maps, "%lx-%lx %4s%*[^\n]", &start, &end, permissions) == 3) {
		if (start <= (unsigned long)address && (unsigned long)address < end)
			found = permissions[which];
	}
	fclose(maps);
	return found;
}

static int prepare(function *from, void **original, struct udd_patch *ret)
{
	return udd_patch_prepare((void *)(uintptr_t)from, hook, original, ret);
}

static void patching(void)
{
	struct udd_patch patches[3];
	struct udd_patch refused;
	void *original_small = NULL;
	function *volatile call;
	void *original = NULL;
	unsigned char before[16];

	check(prepare(movable, NULL, &refused) == -ENOTSUP); // no room for stubs yet
	area_used = 0;
	check(udd_patch_init((const void *)(uintptr_t)movable) == 0);
	check(llabs((long long)((char *)area - (char *)(uintptr_t)movable)) < 1LL << 31);

	check(prepare(movable, &original, &patches[0]) == 0);
	call = movable;
	check(call(1) == 42);

	// Not at an aligned address: could not be written at once.
	memcpy(before, (void *)(uintptr_t)crooked, sizeof(before));
	check(prepare(crooked, NULL, &refused) == -ENOTSUP && !refused.entry);
	original_unchanged((void *)(uintptr_t)crooked, before, crooked, 43);

	// Its first instruction works at its place only: refused if the original is wanted, else welcome.
	memcpy(before, (void *)(uintptr_t)stuck, sizeof(before));
	check(prepare(stuck, &original_small, &refused) == -ENOTSUP);
	check(!original_small);
	original_unchanged((void *)(uintptr_t)stuck, before, stuck, 42);
	check(prepare(stuck, NULL, &patches[1]) == 0);
	check(prepare(small, &original_small, &patches[2]) == 0);

	check(udd_patch_seal() == 0);
	check(udd_patch_apply(&refused) == 0);
	for (int i = 0; i < 3; i++)
		check(udd_patch_apply(&patches[i]) == 0);
	// From this moment on any thread may come by.
	call = movable;
	check(call(1) == 1001);
	check(((function *)original)(1) == 42);
	call = stuck;
	check(call(2) == 1002);
	check(((function *)original_small)(1) == 45);
	udd_patch_done();
	check(permission_of(area, 1) == '-' && permission_of(area, 2) == 'x');
	check(permission_of((const void *)(uintptr_t)movable, 1) == '-' && permission_of((const void *)(uintptr_t)movable, 2) == 'x');
	call = small;
	check(call(3) == 1003 && ((function *)original_small)(3) == 47);
}

static void room_for_stubs_ends(void)
{
	struct udd_patch refused;
	int taken = 0;

	udd_sys(SYS_mprotect, area, AREA_BYTES, PROT_READ | PROT_WRITE);
	while (take_stub())
		taken++;
	check(taken > 0 && area_used <= AREA_BYTES);
	check(prepare(small, NULL, &refused) == -ENOTSUP);
}

int main(void)
{
	instruction_lengths();
	patching();
	room_for_stubs_ends();
	return 0;
}
