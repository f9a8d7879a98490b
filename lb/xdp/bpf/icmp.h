/*
 * ICMP and ICMPv6 errors (RFC 792, RFC 4443). Those that we send: when a packet is longer than its way allows. And
 * those that come to an address of ours: they quote a packet that went to a client, and go to the backend that it came
 * from, in the manner of the mode. Where the mode rewrites addresses it does so in the quote, too: its receiver looks
 * there for what it has sent.
 */
#pragma once
#include "answer.h"
#include "checksum.h"
#include "count.h"
#include "decode.h"
#include "forward.h"
#include "limit.h"
#include "listen.h"
#include "maps.h"
#include "nat.h"
#include "packet.h"
#include "parse.h"
#include "quic.h"

/* Of both ICMPs: type, code, checksum, and 4 octets that depend on them. */
struct icmp_header {
	__u8 type;
	__u8 code;
	__u16 checksum;
	__be32 rest;
};

/* RFC 792, RFC 1191, RFC 4443. linux/icmp.h needs more headers than a compiler for bpf has. */
#define ICMP_UNREACHABLE 3
#define ICMP_FRAGMENTATION_NEEDED 4 /* a code of it */
#define ICMP_TIME_EXCEEDED 11
#define ICMP_PARAMETER_PROBLEM 12
#define ICMPV6_UNREACHABLE 1
#define ICMPV6_TOO_BIG 2
#define ICMPV6_TIME_EXCEEDED 3
#define ICMPV6_PARAMETER_PROBLEM 4

#define MAX_ICMP_ERROR 576 /* octets of the whole packet (RFC 1812, section 4.3.2.3) */
#define MAX_ICMPV6_ERROR 1280 /* RFC 4443, section 2.4 */

/* Octets of a frame, NULL if they are not all in its first buffer. */
static __always_inline void *octets_at(struct xdp_md *ctx, __u32 at, __u32 octets)
{
	struct cursor cursor = frame_of(ctx);
	void *found;

	if (at > OFFSET_MAX)
		return NULL;
	barrier_var(at);
	found = cursor.frame + (at & OFFSET_MAX); /* verifier: it forgets */
	return found + octets > cursor.end ? NULL : found;
}

/* The folded sum of some octets of a frame, whichever buffer they are in: at most MAX_ICMPV6_ERROR. */
__noinline int sum_of_frame(struct xdp_md *ctx, __u32 at, __u32 length)
{
	__be32 chunk[16];
	__u32 octets;
	__u64 sum = 0;

#pragma nounroll
	for (__u32 i = 0; i < MAX_ICMPV6_ERROR / sizeof(chunk) && length > 0; i++) {
		octets = length < sizeof(chunk) ? length : sizeof(chunk);
		__builtin_memset(chunk, 0, sizeof(chunk));
		if (bpf_xdp_load_bytes(ctx, at, chunk, octets))
			break; /* verifier: they are there */
		sum += (__u32)bpf_csum_diff(NULL, 0, chunk, sizeof(chunk), 0);
		at += octets;
		length -= octets;
	}
	return checksum_fold(sum);
}

/*
 * Turns a packet that is too long into the ICMP error that tells its sender so: `mtu` is what it may send. Returns
 * XDP_TX, or XDP_DROP if there is nothing to be said, or too much was said already. `packet` and the frame must agree.
 */
__noinline int send_too_big(struct xdp_md *ctx, struct packet *packet, __u32 mtu)
{
	struct total_counters *total = totals();
	__u32 l3, header, most, quoted, octets;
	struct icmp_header *icmp;
	struct cursor cursor = frame_of(ctx);
	__u8 mac[ETH_ALEN];
	__u64 sum = 0;
	int cut;

	if (!packet || !total || cursor.frame + ETH_HLEN > cursor.end)
		return XDP_DROP; /* verifier: for all it knows */
	/* Never about an ICMP error (RFC 1122, section 3.2.2). */
	if (packet->protocol != IPPROTO_UDP || !is_answerable(&packet->flow.client))
		return XDP_DROP;
	if (!too_big_allowed()) {
		total->too_big_limited++;
		return XDP_DROP;
	}

	l3 = packet->l3;
	header = packet->is_ipv6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr);
	most = (packet->is_ipv6 ? MAX_ICMPV6_ERROR : MAX_ICMP_ERROR) - header - sizeof(*icmp);
	quoted = packet->ip_length < most ? packet->ip_length : most;
	octets = sizeof(*icmp) + quoted;
	copy_mac(mac, cursor.frame + ETH_ALEN);
	cut = l3 + quoted - bpf_xdp_get_buff_len(ctx);
	if ((cut && bpf_xdp_adjust_tail(ctx, cut)) || move_start(ctx, l3, header + sizeof(*icmp)))
		return XDP_DROP; /* no room before the frame */
	cursor = frame_of(ctx);
	icmp = write_answer(cursor, packet, packet->is_ipv6 ? IPPROTO_ICMPV6 : IPPROTO_ICMP, octets);
	if (!icmp)
		return XDP_DROP; /* verifier: it is there */
	address_frame(cursor, mac);
	icmp->type = packet->is_ipv6 ? ICMPV6_TOO_BIG : ICMP_UNREACHABLE;
	icmp->code = packet->is_ipv6 ? 0 : ICMP_FRAGMENTATION_NEEDED;
	icmp->checksum = 0;
	icmp->rest = bpf_htonl(mtu);
	if (packet->is_ipv6)
		sum = checksum_sum_pseudo_header(&packet->flow, IPPROTO_ICMPV6, octets);
	sum += sum_of_frame(ctx, l3 + header, octets);
	icmp = octets_at(ctx, l3 + header, sizeof(*icmp)); /* verifier: a function was called */
	if (!icmp)
		return XDP_DROP; /* verifier: it is there */
	icmp->checksum = ~checksum_fold(sum);
	total->too_big_sent++;
	return XDP_TX;
}

static __always_inline int is_error(const struct packet *packet, __u8 type)
{
	if (packet->is_ipv6)
		return type == ICMPV6_UNREACHABLE || type == ICMPV6_TOO_BIG || type == ICMPV6_TIME_EXCEEDED ||
		       type == ICMPV6_PARAMETER_PROBLEM;
	return type == ICMP_UNREACHABLE || type == ICMP_TIME_EXCEEDED || type == ICMP_PARAMETER_PROBLEM;
}

/*
 * Looks into an ICMP error for a UDP packet that came from where the error goes. Returns whether there is one. Then
 * packet->flow is the quoted packet's, from the client's point of view. If it is a long header packet, packet->dcid is
 * its Source CID: it comes from a server.
 */
__noinline int read_quote(struct xdp_md *ctx, struct packet *packet)
{
	struct cursor cursor = frame_of(ctx);
	struct icmp_header *icmp;
	struct quic_header quic;
	__u32 quote, l4, end, at;
	struct ipv6hdr *ipv6;
	union address came_to;
	struct udphdr *udp;
	struct iphdr *ipv4;
	__u8 *octet;

	if (!packet)
		return 0; /* verifier: for all it knows */
	icmp = octets_at(ctx, packet->l4, sizeof(*icmp));
	if (!icmp || !is_error(packet, icmp->type))
		return 0;
	came_to = packet->flow.local;
	quote = packet->l4 + sizeof(*icmp);
	end = packet->l3 + packet->ip_length;
	if (packet->is_ipv6) {
		/* Neither we nor QUIC servers send extension headers. */
		ipv6 = octets_at(ctx, quote, sizeof(*ipv6));
		if (!ipv6 || ipv6->version != 6 || ipv6->nexthdr != IPPROTO_UDP)
			return 0;
		set_ipv6(&packet->flow.client, &ipv6->daddr);
		set_ipv6(&packet->flow.local, &ipv6->saddr);
		l4 = quote + sizeof(*ipv6);
	} else {
		ipv4 = octets_at(ctx, quote, sizeof(*ipv4));
		if (!ipv4 || ipv4->version != 4 || ipv4->ihl < 5 || ipv4->protocol != IPPROTO_UDP ||
		    ipv4->frag_off & bpf_htons(IPV4_FRAGMENT_OFFSET))
			return 0;
		set_ipv4(&packet->flow.client, ipv4->daddr);
		set_ipv4(&packet->flow.local, ipv4->saddr);
		l4 = quote + ipv4->ihl * 4;
	}
	udp = octets_at(ctx, l4, sizeof(*udp));
	if (!udp || !udp->source || l4 + sizeof(*udp) > end || packet->flow.local.halves[0] != came_to.halves[0] ||
	    packet->flow.local.halves[1] != came_to.halves[1])
		return 0;
	packet->flow.client_port = udp->dest;
	packet->flow.local_port = udp->source;
	packet->flow.zero = 0;
	packet->payload = quote;
	packet->quoted_l4 = l4;
	packet->is_long = 0;
	packet->dcid_length = 0;

	at = l4 + sizeof(*udp);
	octet = octets_at(ctx, at, 1);
	if (!octet || end <= at || parse_quic(octet, cursor.end, end - at, &quic) || !quic.is_long)
		return 1;
	at += quic.dcid + quic.dcid_length;
	octet = octets_at(ctx, at, 1);
	if (octet) {
		packet->dcid = at + 1;
		packet->dcid_length = *octet;
	}
	return 1;
}

static __always_inline int is_too_big(const struct packet *packet, const struct icmp_header *icmp)
{
	if (packet->is_ipv6)
		return icmp->type == ICMPV6_TOO_BIG;
	return icmp->type == ICMP_UNREACHABLE && icmp->code == ICMP_FRAGMENTATION_NEEDED;
}

static __always_inline int is_unreachable(const struct packet *packet, const struct icmp_header *icmp)
{
	if (packet->is_ipv6)
		return icmp->type == ICMPV6_UNREACHABLE;
	return icmp->type == ICMP_UNREACHABLE && icmp->code != ICMP_FRAGMENTATION_NEEDED;
}

static __always_inline __u64 sum_of_ipv6_addresses(const struct ipv6hdr *ip)
{
	return checksum_sum_address((const union address *)&ip->saddr) +
	       checksum_sum_address((const union address *)&ip->daddr);
}

/* What went from a packet, and what came in its place: sums, for the checksum around it. */
struct change {
	__u64 gone;
	__u64 come;
};

/* The addresses of the error itself: it goes to the quote's new source. Returns an XDP action. */
static __always_inline int translate_outer(struct xdp_md *ctx, const struct packet *packet,
					   const struct translation *to, int is_from_us, struct change *change)
{
	struct ipv6hdr *ipv6;
	struct iphdr *ipv4;
	__be32 source;

	if (packet->is_ipv6) {
		ipv6 = octets_at(ctx, packet->l3, sizeof(*ipv6));
		if (!ipv6)
			return XDP_DROP; /* verifier: it is there */
		if (decrement_hop_limit(ipv6))
			return drop_for(FAILURE_HOP_LIMIT);
		change->gone += sum_of_ipv6_addresses(ipv6); /* ICMPv6's checksum covers them */
		__builtin_memcpy(&ipv6->daddr, &to->source, sizeof(ipv6->daddr));
		if (is_from_us)
			__builtin_memcpy(&ipv6->saddr, &to->destination, sizeof(ipv6->saddr));
		change->come += sum_of_ipv6_addresses(ipv6);
		return XDP_TX;
	}
	ipv4 = octets_at(ctx, packet->l3, sizeof(*ipv4));
	if (!ipv4)
		return XDP_DROP; /* verifier: it is there */
	if (decrement_ttl(ipv4))
		return drop_for(FAILURE_HOP_LIMIT);
	source = is_from_us ? to->destination.words[3] : ipv4->saddr;
	ipv4->check = checksum_update(ipv4->check, (__u64)ipv4->saddr + ipv4->daddr,
				      (__u64)source + to->source.words[3]);
	ipv4->saddr = source;
	ipv4->daddr = to->source.words[3];
	return XDP_TX;
}

/* The addresses of the quoted packet. Returns 0 or -1. */
static __always_inline int translate_quoted_ip(struct xdp_md *ctx, const struct packet *packet,
					       const struct translation *to, struct change *change)
{
	struct ipv6hdr *ipv6;
	struct iphdr *ipv4;

	if (packet->is_ipv6) {
		ipv6 = octets_at(ctx, packet->payload, sizeof(*ipv6));
		if (!ipv6)
			return -1; /* verifier: it is there */
		change->gone += sum_of_ipv6_addresses(ipv6);
		write_ipv6_addresses(ipv6, &to->source, &to->destination);
		change->come += sum_of_ipv6_addresses(ipv6);
		return 0;
	}
	ipv4 = octets_at(ctx, packet->payload, sizeof(*ipv4));
	if (!ipv4)
		return -1; /* verifier: it is there */
	change->gone += (__u64)ipv4->saddr + ipv4->daddr + ipv4->check;
	translate_ipv4(ipv4, to);
	change->come += (__u64)ipv4->saddr + ipv4->daddr + ipv4->check;
	return 0;
}

/* Its ports and its checksum, whether or not all that this covers is quoted. Returns 0 or -1. */
static __always_inline int translate_quoted_udp(struct xdp_md *ctx, const struct packet *packet,
						const struct translation *to, struct change *change)
{
	struct udphdr *udp = octets_at(ctx, packet->quoted_l4, sizeof(*udp));

	if (!udp)
		return -1; /* verifier: it is there */
	change->gone += (__u64)udp->source + udp->dest + udp->check;
	translate_udp(udp, packet, to);
	change->come += (__u64)udp->source + udp->dest + udp->check;
	return 0;
}

/*
 * Gives the quote in an ICMP error another source and destination. The error goes to the new source; with `is_from_us`
 * it comes from the new destination, and nobody learns who sent it. Checksums stay as right, or wrong, as they were.
 * MAC addresses are for the caller to write. Returns an XDP action, and has then counted what went wrong.
 */
__noinline int translate_error(struct xdp_md *ctx, struct packet *packet, struct translation *to, __u32 mtu,
			       int is_from_us)
{
	struct change change = {};
	struct icmp_header *icmp;
	int action;

	if (!packet || !to)
		return XDP_DROP; /* verifier: for all it knows */
	/* In the other family the quote would need headers that nobody has sent. Its receiver finds out by loss. */
	if (packet->is_ipv6 != to->is_ipv6)
		return drop_for(FAILURE_NO_FLOW);
	if (packet->ip_length > mtu)
		return drop_for(FAILURE_TOO_LARGE);
	action = translate_outer(ctx, packet, to, is_from_us, &change);
	if (action != XDP_TX)
		return action;
	if (translate_quoted_ip(ctx, packet, to, &change) || translate_quoted_udp(ctx, packet, to, &change))
		return XDP_DROP; /* verifier: they are there */
	icmp = octets_at(ctx, packet->l4, sizeof(*icmp));
	if (!icmp)
		return XDP_DROP; /* verifier: it is there */
	icmp->checksum = checksum_update(icmp->checksum, change.gone, change.come);
	return XDP_TX;
}

/* Modes nat and dnat: an ICMP error to a backend. */
static __noinline int translate_error_to_backend(struct xdp_md *ctx, struct packet *packet, __u32 slot)
{
	struct backend *backend = bpf_map_lookup_elem(&backends, &slot);
	struct nat_key key = nat_key(&packet->flow, slot);
	struct translation to = {};
	struct nat_flow *flow;
	int action;

	if (!backend || !backend->incarnation)
		return drop_for(FAILURE_NO_FLOW);
	if (!is_resolved(backend))
		return drop_for(FAILURE_UNREACHABLE);
	to.is_ipv6 = backend->is_ipv6;
	to.source = backend->address;
	to.source_port = backend->port;
	to.destination = packet->flow.client;
	to.destination_port = packet->flow.client_port;
	if (settings.forward_mode == FORWARD_NAT) {
		flow = bpf_map_lookup_elem(&nat_out, &key);
		if (!flow)
			return drop_for(FAILURE_NO_FLOW);
		to.destination.halves[0] = to.is_ipv6 ? settings.source_ipv6.halves[0] : settings.source_ipv4.halves[0];
		to.destination.halves[1] = to.is_ipv6 ? settings.source_ipv6.halves[1] : settings.source_ipv4.halves[1];
		to.destination_port = flow->port;
	}
	action = translate_error(ctx, packet, &to, backend->mtu, 0);
	if (action == XDP_TX)
		address_frame(frame_of(ctx), backend->next_hop);
	return action;
}

/* The other modes: an ICMP error to a backend, as it is. */
static __noinline int send_error_to_backend(struct xdp_md *ctx, struct packet *packet, __u32 slot)
{
	struct backend *backend = bpf_map_lookup_elem(&backends, &slot);

	if (!backend || !backend->incarnation)
		return drop_for(FAILURE_NO_FLOW);
	if (!is_resolved(backend))
		return drop_for(FAILURE_UNREACHABLE);
	if (packet->ip_length + growth(packet, backend->is_ipv6) > backend->mtu)
		return drop_for(FAILURE_TOO_LARGE);
	return send_whole(ctx, packet, backend);
}

/* The slot of the backend that gets a client's 4-tuple. Nothing is remembered: anybody can quote anything. */
static __noinline __u32 backend_of_flow(struct packet *packet, const struct service *service)
{
	__u32 slot = NO_BACKEND_SLOT;

	packet->is_long = 0; /* who waits for the hold-off gets it too */
	return remembered(packet, &slot) ? slot : fallback(service, &packet->flow);
}

/*
 * Mode nat: an ICMP error about a packet from us to a backend. That a backend, or its network, refuses packets is news
 * for its health. If they are too long only the client can help: it gets the error, as one of our own.
 */
__noinline int error_from_backend(struct xdp_md *ctx, struct packet *packet)
{
	struct icmp_header *icmp = packet ? octets_at(ctx, packet->l4, sizeof(*icmp)) : NULL;
	struct total_counters *total = totals();
	struct backend_counters *counted;
	struct return_key key = {};
	struct translation to = {};
	struct nat_return *back;
	int action;

	if (!packet || !icmp || !total)
		return XDP_PASS; /* verifier: for all it knows */
	key.backend = packet->flow.client;
	key.backend_port = packet->flow.client_port;
	key.port = packet->flow.local_port;
	back = bpf_map_lookup_elem(&nat_in, &key);
	if (!back)
		return XDP_PASS;
	if (is_unreachable(packet, icmp)) {
		counted = bpf_map_lookup_elem(&backend_count, &back->backend);
		if (counted)
			counted->unreachable++;
		return XDP_DROP;
	}
	if (!is_too_big(packet, icmp))
		return XDP_PASS;
	if (!too_big_allowed()) {
		total->too_big_limited++;
		return XDP_DROP;
	}
	to.is_ipv6 = !is_ipv4_mapped(&back->flow.client);
	to.source = back->flow.client;
	to.source_port = back->flow.client_port;
	to.destination = back->flow.local;
	to.destination_port = back->flow.local_port;
	action = translate_error(ctx, packet, &to, settings.interface_mtu, 1);
	if (action != XDP_TX)
		return action;
	address_frame(frame_of(ctx), back->client_mac);
	total->too_big_sent++;
	return XDP_TX;
}

/*
 * An ICMP or ICMPv6 packet: an error about a packet of ours goes where that came from, all else to the stack. `found`
 * is for this function to fill, on the caller's stack.
 */
static __always_inline int icmp_error(struct xdp_md *ctx, struct packet *packet, struct found *found)
{
	struct total_counters *total;
	struct service *service;
	struct cursor cursor;
	struct cid cid;
	int action;

	if (packet->fragment || !read_quote(ctx, packet))
		return XDP_PASS;
	service = find_service(&packet->flow.local, packet->flow.local_port);
	if (!service) {
		if (settings.forward_mode != FORWARD_NAT || !is_our_source(&packet->flow.local))
			return XDP_PASS;
		return error_from_backend(ctx, packet);
	}
	found->slot = NO_BACKEND_SLOT;
	if (packet->dcid_length) {
		cursor = frame_of(ctx);
		load_cid(ctx, packet, cursor.frame + (packet->dcid & OFFSET_MAX), cursor.end, &cid);
		if (by_cid(service, &cid, packet->dcid_length, found) != ROUTABLE)
			found->slot = NO_BACKEND_SLOT;
	}
	if (found->slot == NO_BACKEND_SLOT)
		found->slot = backend_of_flow(packet, service);
	if (settings.forward_mode == FORWARD_NAT || settings.forward_mode == FORWARD_DNAT)
		action = translate_error_to_backend(ctx, packet, found->slot);
	else
		action = send_error_to_backend(ctx, packet, found->slot);
	total = totals();
	if (action == XDP_TX && total)
		total->icmp_forwarded++;
	return action;
}
