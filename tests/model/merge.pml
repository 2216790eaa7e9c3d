/* SPDX-License-Identifier: MIT
 *
 * A model of the merge protocol
 * =============================
 *
 * udedup replaces pages of a running program by copies that it shares with others. The program's threads write, unmap, move,
 * discard and fork all the while, devices write behind the page tables' back, and the agent's own two threads work against
 * each other too. Tests meet few of the orders in which all that may happen. Spin (spinroot.com) goes through every one of
 * them, for one to three pages and two or three threads, and says of each state whether
 *
 *  - a read returned what it may return: no write was lost, no discarded page came back (application.pml, "the oracle");
 *  - no mapping that is not ours was mapped over, and no page was replaced that a device may write to (the assertions in
 *    kernel.pml and agent.pml);
 *  - somebody can go on, until all threads have done what they were to do: nobody waits for ever in a fault, in a discard or
 *    for the map lock. Spin calls the contrary an invalid end state. (Retrying counts as going on.)
 *
 * Three files: kernel.pml is Linux: page tables, mappings, userfaultfd. agent.pml is native/agent: worker, fault thread,
 * map lock, the table of runs. application.pml is the program: its threads, and the hooks that run on them. One process of
 * the model is one thread; whatever one of its steps does, the kernel or the map lock makes atomic. So two accesses to shared
 * memory, or two system calls, are two steps, and everyone else may come between.
 *
 * A page's life: ANON in a PLAIN mapping; registered MISSING; moved to staging (pte ABSENT, who touches it waits); compared;
 * then a STORE mapping, registered and write-protected (ARMED), or moved back. A write to it raises a fault, the fault thread
 * puts a private copy in its place (dissolve), or lifts protection (break in place: private, but in the STORE mapping).
 *
 * What is left out: the engine, of which nothing is trusted that matters here; memory orders (the C code uses sequentially
 * consistent atomics where two threads race); the futexes of the lock; what lists and queues can hold; huge pages; swap;
 * fork children, beyond what their page tables get; mlock, protection keys; hooks interrupted by signals.
 * A thread that waits for a limited time in the C code is in the model free to get what it waits for, or to do without
 * where somebody is in the way.
 *
 * test_model.py knows the configurations (which threads do what), and runs each to the end. It also takes away one safeguard
 * at a time, by a switch, and expects spin to find the harm: see MUTATIONS there. Switches that begin with LIMIT let the
 * program do what the README says is not noticed.
 */

#ifndef PAGES
#define PAGES 1
#endif
#ifndef THREADS
#define THREADS 2
#endif
#ifndef OPERATIONS
#define OPERATIONS 2
#endif
#ifndef ROUNDS
#define ROUNDS 2
#endif
#ifndef WORK
#define WORK 1
#endif
#ifndef WORK_PAGE
#define WORK_PAGE 0
#endif
#ifndef MERGE_FROM
#define MERGE_FROM 0
#endif
#ifndef MERGE_TO
#define MERGE_TO PAGES
#endif
#ifndef MERGED
#define MERGED 0
#endif
#ifndef FAILURES
#define FAILURES 0
#endif
#ifndef OWN_STACK_DISSOLVES
#define OWN_STACK_DISSOLVES 0
#endif
#ifndef MAY0
#define MAY0 (READ_PAGE | WRITE_PAGE)
#endif
#ifndef MAY1
#define MAY1 (READ_PAGE | WRITE_PAGE)
#endif
#ifndef MAY2
#define MAY2 0
#endif
#ifndef ON0
#define ON0 (BIT(PAGES) - 1)
#endif
#ifndef ON1
#define ON1 (BIT(PAGES) - 1)
#endif
#ifndef ON2
#define ON2 (BIT(PAGES) - 1)
#endif

#include "kernel.pml"
#include "agent.pml"
#include "application.pml"

init {
	byte p;

	atomic {
		for (p : 0 .. PAGES - 1) {
			if
			:: MERGED & BIT(p) ->
				vma[p] = STORE; watch[p] = ARMED; pte[p] = FILE; protected[p] = 1; merged[p] = 1; armed[p] = 1;
				allowed[p] = BIT(SAME)
			:: !(MERGED & BIT(p)) ->
				pte[p] = ANON; content[p] = SAME; candidate[p] = 1; allowed[p] = BIT(SAME)
			fi
		}
		p = 0;
		run worker();
		run fault_thread();
		run application(0, MAY0, ON0);
		run application(1, MAY1, ON1);
#if THREADS > 2
		run application(2, MAY2, ON2)
#endif
	}
}
