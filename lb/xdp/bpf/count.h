/*
 * What was counted, and samples of it.
 */
#pragma once
#include "maps.h"
#include "packet.h"

static __always_inline struct total_counters *totals(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&total_count, &zero);
}

/* A packet that cannot be sent. Returns what becomes of it. */
static __always_inline int drop_for(enum failure failure)
{
	struct total_counters *total = totals();

	if (total)
		total->failures[failure]++;
	return XDP_DROP;
}

/* Gives a frame to whoever looks at the samples. */
__noinline int take_sample(struct xdp_md *ctx, __u32 verdict, __u32 service)
{
	struct sample *sample = bpf_ringbuf_reserve(&samples, sizeof(*sample), 0);
	__u64 length = bpf_xdp_get_buff_len(ctx);
	__u32 captured = length;

	if (captured > SAMPLE_OCTETS)
		captured = SAMPLE_OCTETS;
	if (!sample) {
		struct total_counters *total = totals();

		if (total)
			total->samples_lost++;
		return 0;
	}
	sample->verdict = verdict;
	sample->service = service;
	sample->length = length;
	sample->captured = captured;
	__builtin_memset(sample->octets, 0, SAMPLE_OCTETS);
	barrier_var(captured);
	if (captured > 0 && captured <= SAMPLE_OCTETS) /* verifier: it always is */
		bpf_xdp_load_bytes(ctx, 0, sample->octets, captured);
	bpf_ringbuf_submit(sample, BPF_RB_NO_WAKEUP);
	return 0;
}

/* Takes a sample of one datagram in so many, if it has a verdict that is wanted. */
static __noinline void consider_sample(struct xdp_md *ctx, const struct sampling *wanted, __u32 verdict, __u32 service)
{
	if (wanted->verdicts && !(wanted->verdicts & 1 << verdict))
		return;
	if (bpf_get_prandom_u32() % wanted->every == 0)
		take_sample(ctx, verdict, service);
}

/* Every datagram to a listener comes here exactly once. */
static __always_inline void count_verdict(struct xdp_md *ctx, const struct service *service,
					  struct service_counters *counted, __u32 verdict)
{
	__u32 zero = 0;
	struct sampling *wanted = bpf_map_lookup_elem(&sampling, &zero);

	barrier_var(verdict);
	if (verdict < VERDICTS) /* verifier: it always is */
		counted->verdicts[verdict]++;
	if (wanted && unlikely(wanted->every))
		consider_sample(ctx, wanted, verdict, service->index);
}
