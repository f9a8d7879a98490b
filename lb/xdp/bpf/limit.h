/*
 * Token buckets, as in lb/limiter.py: a bucket fills at its rate up to one second's worth. Two things differ. The
 * common bucket of a service's resets is one for each CPU. And prefixes have a line each by hash, which the next
 * prefix that falls on it takes over: no list, no lock. CPUs that race for a line may let a few packets more or fewer
 * through.
 */
#pragma once
#include "bpf.h"
#include "maps.h"
#include "shared.h"

/* Tokens are counted in billionths: what a rate of one per second fills in a nanosecond. No product or sum below
 * exceeds 2 * 2^32 * 10^9, which is less than 2^63. */
#define SECOND 1000000000ULL
#define TOKEN 1000000000ULL

#define TOO_BIG_RATE 1000 /* ICMP errors per second and CPU; as Linux, net.ipv4.icmp_msgs_per_sec */

/* What `rate`, which is not 0, has left in a bucket by now. */
static __always_inline __u64 fill(struct bucket *bucket, __u32 rate, __u64 now)
{
	__u64 burst = rate * TOKEN, tokens = bucket->tokens;

	if (now > bucket->filled_at) {
		__u64 elapsed = now - bucket->filled_at;

		tokens += (elapsed < SECOND ? elapsed : SECOND) * rate;
		bucket->filled_at = now;
	}
	if (tokens > burst)
		tokens = burst;
	bucket->tokens = tokens;
	return tokens;
}

/* What one attacker can be assumed to own, an IPv4 /24 or an IPv6 /56, together with a service: as a hash. */
static __always_inline __u64 prefix_hash(const union address *client, const struct service *service)
{
	int is_ipv4 = !client->halves[0] && client->words[2] == bpf_htonl(0xffff);
	__u64 all_but_last_octet = ~0xffULL, hash = settings.hash_seed;

	hash = (hash ^ (be64_to_cpu(client->halves[0]) & all_but_last_octet)) * HASH_MULTIPLIER;
	hash ^= hash >> 32;
	hash ^= (is_ipv4 ? be64_to_cpu(client->halves[1]) & all_but_last_octet : 0) | service->index;
	hash *= HASH_MULTIPLIER;
	hash ^= hash >> 32;
	return hash * HASH_MULTIPLIER;
}

/*
 * The bucket of a client's prefix in `reset_prefixes` or `flow_prefixes`, full if somebody else had the line: prefixes
 * that share one would lift each other's limit rather than bear it. Who does is the seed's secret.
 */
static __always_inline struct bucket *prefix_bucket(void *buckets, const union address *client,
						    const struct service *service, __u32 rate, __u64 now)
{
	__u64 hash = prefix_hash(client, service);
	__u32 line = hash >> 51; /* neighbours differ there */
	struct prefix_bucket *found = bpf_map_lookup_elem(buckets, &line);

	_Static_assert(PREFIX_BUCKETS == 1 << 13, "13 bits of the hash");
	if (!found)
		return NULL; /* verifier: every line exists */
	if (found->prefix_hash != hash) {
		found->prefix_hash = hash;
		found->bucket.tokens = rate * TOKEN;
		found->bucket.filled_at = now;
	}
	return &found->bucket;
}

/* Whether one more flow may begin from a client's prefix. */
static __always_inline int new_flow_allowed(const struct service *service, const union address *client)
{
	__u32 rate = service->new_flows_rate;
	struct bucket *prefix;
	__u64 now;

	if (!rate)
		return 1;
	now = bpf_ktime_get_coarse_ns();
	prefix = prefix_bucket(&flow_prefixes, client, service, rate, now);
	if (!prefix || fill(prefix, rate, now) < TOKEN)
		return 0;
	prefix->tokens -= TOKEN;
	return 1;
}

/* Whether a client may be sent one more reset: its prefix and the service on this CPU must both have a token. */
static __always_inline int reset_allowed(const struct service *service, const union address *client)
{
	__u32 index = service->index, rate = service->reset_rate, prefix_rate = service->reset_prefix_rate;
	__u64 now = bpf_ktime_get_coarse_ns();
	struct bucket *prefix = NULL;

	if (prefix_rate) {
		prefix = prefix_bucket(&reset_prefixes, client, service, prefix_rate, now);
		if (!prefix || fill(prefix, prefix_rate, now) < TOKEN)
			return 0;
	}
	if (rate) {
		struct bucket *common = bpf_map_lookup_elem(&reset_buckets, &index);

		if (!common || fill(common, rate, now) < TOKEN)
			return 0;
		common->tokens -= TOKEN;
	}
	if (prefix)
		prefix->tokens -= TOKEN;
	return 1;
}

/* Whether a client may be sent one more ICMP error. */
static __always_inline int too_big_allowed(void)
{
	__u32 zero = 0;
	struct bucket *bucket = bpf_map_lookup_elem(&too_big_bucket, &zero);

	if (!bucket || fill(bucket, TOO_BIG_RATE, bpf_ktime_get_coarse_ns()) < TOKEN)
		return 0;
	bucket->tokens -= TOKEN;
	return 1;
}
