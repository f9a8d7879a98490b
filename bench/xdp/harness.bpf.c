/*
 * What stands around a program under test: a wrapper for test runs, a generator of frames for a veth pair, and programs
 * that do nothing, to know what the rest costs.
 */
#include "bpf.h"

#define MAX_FLOWS 16384
#define HEAD_WORDS 8 /* Ethernet, IPv4, UDP and the first 22 octets of QUIC: a cache line */
#define MORE_WORDS 4 /* for what comes before them otherwise: IPv6, VLAN tags */

struct head {
	__u64 words[HEAD_WORDS];
};

struct more {
	__u64 words[MORE_WORDS];
};

struct bench {
	__u32 frame_length;
	__u32 flow_mask; /* flows in rotation, less one: a power of two */
	__u32 long_heads; /* they go on in the second map */
	__u32 fresh_clients; /* every packet is from a client address of its own */
	__u32 new_generations; /* nothing that was cached before a packet counts */
	__u32 restores_tail; /* the program shortens frames; others lengthen them at the head */
};

/* A flow's first octets, and those behind them. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_FLOWS);
	__type(key, __u32);
	__type(value, struct head);
} heads SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_FLOWS);
	__type(key, __u32);
	__type(value, struct more);
} more SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} target SEC(".maps");

/* The generation of the program under test: its own map takes the place of this one. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} generations SEC(".maps");

/* 0: where the generator sends. */
struct {
	__uint(type, BPF_MAP_TYPE_DEVMAP);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} interface SEC(".maps");

/* 0: frames that arrived at the sink. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} arrived SEC(".maps");

const volatile struct bench bench SEC(".rodata.bench");

__u32 sent;

/* Puts the next flow's head on the frame; negative if that cannot be. */
static __always_inline int put_head(struct xdp_md *ctx)
{
	__u64 *frame = (void *)(long)ctx->data;
	void *end = (void *)(long)ctx->data_end;
	__u32 number = sent++, flow = number & bench.flow_mask;
	struct head *head = bpf_map_lookup_elem(&heads, &flow);

	if (!head || (void *)(frame + HEAD_WORDS) > end)
		return -1;
#pragma unroll
	for (int i = 0; i < HEAD_WORDS; i++)
		frame[i] = head->words[i];
	if (bench.long_heads) {
		struct more *rest = bpf_map_lookup_elem(&more, &flow);

		if (!rest || (void *)(frame + HEAD_WORDS + MORE_WORDS) > end)
			return -1;
#pragma unroll
		for (int i = 0; i < MORE_WORDS; i++)
			frame[HEAD_WORDS + i] = rest->words[i];
	}
	if (bench.fresh_clients)
		*(__u32 *)((void *)frame + 26) = number; /* IPv4: the source address */
	if (bench.new_generations) {
		__u32 zero = 0, *generation = bpf_map_lookup_elem(&generations, &zero);

		if (!generation)
			return -1;
		(*generation)++;
	}
	return 0;
}

SEC("xdp.frags")
int wrap(struct xdp_md *ctx)
{
	__u64 length = ctx->data_end - ctx->data;

	barrier_var(length); /* verifier: a length, and no difference of pointers */
	if (bench.restores_tail ? bpf_xdp_adjust_tail(ctx, (int)(bench.frame_length - length))
				: bpf_xdp_adjust_head(ctx, (int)(length - bench.frame_length)))
		return XDP_ABORTED;
	if (!put_head(ctx))
		bpf_tail_call(ctx, &target, 0);
	return XDP_ABORTED;
}

SEC("xdp.frags")
int null_pass(struct xdp_md *ctx)
{
	(void)ctx;
	return XDP_PASS;
}

SEC("xdp.frags")
int null_tx(struct xdp_md *ctx)
{
	(void)ctx;
	return XDP_TX;
}

/* Runs on live frames: a page comes back as its last receiver left it. */
SEC("xdp.frags")
int generate(struct xdp_md *ctx)
{
	return put_head(ctx) ? XDP_ABORTED : bpf_redirect_map(&interface, 0, 0);
}

SEC("xdp.frags")
int sink(struct xdp_md *ctx)
{
	__u32 zero = 0;
	__u64 *count = bpf_map_lookup_elem(&arrived, &zero);

	(void)ctx;
	if (count)
		(*count)++;
	return XDP_DROP;
}

char _license[] SEC("license") = "GPL";
