/*
 * For backends without tunnel devices: unpacks what the modes ipip and gue have packed, and lets the stack have it.
 * IPv4 and IPv6 in either, in IP (RFC 2003, RFC 2473, RFC 4213) or in UDP (GUE variant 1, draft-ietf-intarea-gue). Only
 * tunnels that end here: what is addressed to others, and everything else, passes as it is.
 */
#include "bpf.h"
#include "checksum.h"
#include "packet.h"
#include "parse.h"

#define GUE_PORT 6080 /* section 6 of its draft */
#define GUE_VARIANT 1 /* an IP packet without a header of GUE's own: the first two bits of either version are 01 */

/* RFC 3168, section 5. */
#define ECN_MASK 3
#define NOT_ECT 0
#define ECT_1 1
#define ECT_0 2
#define CE 3
#define DROPPED 4 /* ours: there is no packet that could have one */

struct decap_counters {
	__u64 decapsulated;
	__u64 dropped_ecn; /* congestion was experienced by a packet that cannot say so */
	__u64 malformed; /* tunnelled to us, but nothing that could be unpacked; dropped */
	__u64 passed; /* no tunnel of ours */
};
_Static_assert(sizeof(struct decap_counters) == 32, "test_decap.py: COUNTERS");

/* Python: where tunnels end, to anything. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, union address);
	__type(value, __u32);
} local SEC(".maps");

/* 0 to what was counted. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct decap_counters);
} decap_count SEC(".maps");

enum outcome { DECAPSULATE, PASS, MALFORMED };

/* What is in a tunnel's packet. */
struct inner {
	__u32 at; /* octets from the start of the frame */
	__u32 octets; /* that may belong to it */
	__u32 version; /* 4 or 6, or what the sender put there */
};

/* Whether this is a tunnel's packet for us, and where the inner one is. */
static __always_inline enum outcome find_inner(struct xdp_md *ctx, struct cursor *cursor, struct packet *outer,
					       struct inner *inner)
{
	int protocol = parse_ip(cursor, outer);
	__u8 *first_octet;

	if (protocol != IPPROTO_IPIP && protocol != IPPROTO_IPV6 && protocol != IPPROTO_UDP)
		return PASS;
	/* Tunnels of ours do not fragment. Others' fragments are for the stack to put together. */
	if (outer->fragment || !bpf_map_lookup_elem(&local, &outer->flow.local))
		return PASS;
	if (protocol == IPPROTO_UDP) {
		/* A checksum is not verified: that takes a look at every octet, and the inner packet has checksums
		 * of its own, which the stack verifies. So there need be none, over IPv6 too (RFC 6935). */
		if (parse_udp(ctx, cursor, outer) || outer->flow.local_port != bpf_htons(GUE_PORT))
			return PASS;
		inner->octets = outer->payload_length;
	} else {
		outer->is_malformed = outer->ip_length <= cursor->at - outer->l3;
		inner->octets = outer->ip_length - (cursor->at - outer->l3);
	}
	if (outer->is_malformed || bpf_xdp_get_buff_len(ctx) < outer->l3 + outer->ip_length)
		return MALFORMED;
	inner->at = cursor->at;
	first_octet = cursor->frame + inner->at;
	if (inner->at > OFFSET_MAX || (void *)(first_octet + 1) > cursor->end)
		return MALFORMED;
	inner->version = *first_octet >> 4;
	if (protocol == IPPROTO_UDP)
		return inner->version >> 2 == GUE_VARIANT ? DECAPSULATE : PASS;
	return inner->version == (protocol == IPPROTO_IPIP ? 4 : 6) ? DECAPSULATE : MALFORMED;
}

static __always_inline __u8 ecn_of_ipv6(const struct ipv6hdr *ip)
{
	return bpf_ntohl(*(const __be32 *)ip) >> 20 & ECN_MASK;
}

/* The outer packet's ECN field; its header has been parsed. */
static __always_inline __u8 outer_ecn(const struct cursor *cursor, const struct packet *outer)
{
	const void *ip = cursor->frame + outer->l3;

	if (outer->l3 > L3_MAX || ip + sizeof(struct iphdr) > cursor->end)
		return NOT_ECT; /* verifier: it is there */
	return outer->is_ipv6 ? ecn_of_ipv6(ip) : ((const struct iphdr *)ip)->tos & ECN_MASK;
}

/* RFC 6040, section 4.2: what becomes of the inner packet's field. */
static __always_inline __u8 decapsulated_ecn(__u8 inner, __u8 outer)
{
	if (outer == CE)
		return inner == NOT_ECT ? DROPPED : CE;
	return inner == ECT_0 && outer == ECT_1 ? ECT_1 : inner;
}

/* Checks an inner header, and moves the congestion on the tunnel's path into it. Returns the ECN field that it has
 * then, DROPPED, or -1 if it is malformed. */
static __always_inline int unpack_ipv4(struct iphdr *ip, const void *end, __u32 octets, __u8 outer)
{
	__u16 *first_word = (__u16 *)ip, before;
	__u32 length;
	__u8 ecn;

	if ((void *)(ip + 1) > end)
		return -1;
	length = bpf_ntohs(ip->tot_len);
	if (ip->ihl < 5 || length < ip->ihl * 4U || length > octets)
		return -1;
	ecn = decapsulated_ecn(ip->tos & ECN_MASK, outer);
	if (ecn == DROPPED)
		return DROPPED;
	before = *first_word;
	ip->tos = (ip->tos & ~ECN_MASK) | ecn;
	ip->check = checksum_update(ip->check, before, *first_word);
	return ecn;
}

static __always_inline int unpack_ipv6(struct ipv6hdr *ip, const void *end, __u32 octets, __u8 outer)
{
	__be32 *first_word = (__be32 *)ip;
	__u8 ecn;

	if ((void *)(ip + 1) > end || sizeof(*ip) + bpf_ntohs(ip->payload_len) > octets)
		return -1;
	ecn = decapsulated_ecn(ecn_of_ipv6(ip), outer);
	if (ecn != DROPPED)
		*first_word = (*first_word & ~bpf_htonl(ECN_MASK << 20)) | bpf_htonl(ecn << 20);
	return ecn;
}

/* Takes out `octets` behind the Ethernet header and its tags. Returns 0 or -1. */
static __always_inline int take_out(struct xdp_md *ctx, __u32 l3, __u32 octets, __be16 type)
{
	struct cursor cursor = frame_of(ctx);
	__u16 words[L3_MAX / 2], *header = cursor.frame;

	if (cursor.frame + L3_MAX > cursor.end)
		return -1; /* verifier: two IP headers are there */
	__builtin_memcpy(words, header, sizeof(words));
	if (bpf_xdp_adjust_head(ctx, octets))
		return -1;
	cursor = frame_of(ctx);
	header = cursor.frame;
	if (cursor.frame + L3_MAX > cursor.end)
		return -1; /* verifier: the inner packet is there */
#pragma unroll
	for (__u32 i = 0; i < L3_MAX / 2; i++)
		if (2 * i < l3)
			header[i] = 2 * i < l3 - sizeof(type) ? words[i] : type;
	return 0;
}

SEC("xdp.frags")
int decap(struct xdp_md *ctx)
{
	struct cursor cursor = frame_of(ctx);
	struct decap_counters *counted;
	struct packet outer = {};
	struct inner inner = {};
	enum outcome outcome;
	__u32 zero = 0;
	void *header;
	int ecn;

	counted = bpf_map_lookup_elem(&decap_count, &zero);
	if (!counted)
		return XDP_PASS; /* verifier: it is there */
	outcome = find_inner(ctx, &cursor, &outer, &inner);
	if (outcome == PASS) {
		counted->passed++;
		return XDP_PASS;
	}
	header = cursor.frame + (inner.at & OFFSET_MAX); /* verifier: it forgets */
	if (outcome == MALFORMED)
		ecn = -1;
	else if (inner.version == 4)
		ecn = unpack_ipv4(header, cursor.end, inner.octets, outer_ecn(&cursor, &outer));
	else if (inner.version == 6)
		ecn = unpack_ipv6(header, cursor.end, inner.octets, outer_ecn(&cursor, &outer));
	else
		ecn = -1;
	if (ecn == DROPPED) {
		counted->dropped_ecn++;
		return XDP_DROP;
	}
	if (ecn < 0 || take_out(ctx, outer.l3, inner.at - outer.l3,
				inner.version == 4 ? bpf_htons(ETH_P_IP) : bpf_htons(ETH_P_IPV6))) {
		counted->malformed++;
		return XDP_DROP;
	}
	counted->decapsulated++;
	return XDP_PASS;
}

char _license[] SEC("license") = "GPL";
