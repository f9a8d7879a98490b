/*
 * Modes nat and dnat: addresses and ports are rewritten, and back again. What a backend sees in nat mode is what the
 * udp engine's backends see: a port of ours for each client and backend.
 */
#pragma once
#include "checksum.h"
#include "count.h"
#include "decode.h"
#include "forward.h"
#include "listen.h"
#include "maps.h"
#include "packet.h"
#include "parse.h"

/* linux/socket.h has them for the kernel only. */
#define FAMILY_IPV4 2
#define FAMILY_IPV6 10

/* Ours. */
#define PORT_TRIES 8
#define PORT_CHECK_EVERY 64 /* datagrams: the half of a flow's state that the way back needs may have been evicted */

/* What a packet is to become. */
struct translation {
	union address source;
	union address destination;
	__be16 source_port;
	__be16 destination_port;
	__u32 is_ipv6;
};

/* Rewrites ports, and a checksum for which the addresses that went, and those that came, have these sums. */
static __always_inline void translate_ports(struct udphdr *udp, const struct translation *to, __u64 gone, __u64 come)
{
	udp->check = checksum_update_udp(udp->check, gone + udp->source + udp->dest,
					 come + to->source_port + to->destination_port);
	udp->source = to->source_port;
	udp->dest = to->destination_port;
}

static __always_inline void translate_udp(struct udphdr *udp, const struct packet *packet, const struct translation *to)
{
	translate_ports(udp, to, checksum_sum_address(&packet->flow.client) + checksum_sum_address(&packet->flow.local),
			checksum_sum_address(&to->source) + checksum_sum_address(&to->destination));
}

static __always_inline void translate_ipv4(struct iphdr *ip, const struct translation *to)
{
	__u64 gone = (__u64)ip->saddr + ip->daddr, come = (__u64)to->source.words[3] + to->destination.words[3];

	ip->check = checksum_update(ip->check, gone, come);
	ip->saddr = to->source.words[3];
	ip->daddr = to->destination.words[3];
}

/* Rewrites a UDP packet within its family. Returns an XDP action, and has then counted what went wrong. */
static __always_inline int translate(struct xdp_md *ctx, const struct packet *packet, const struct translation *to,
				     const void *mac)
{
	__u32 l3 = packet->l3, l4 = packet->l4;
	struct cursor cursor = frame_of(ctx);
	struct ipv6hdr *ipv6;
	struct udphdr *udp;
	struct iphdr *ip;

	if (l3 > L3_MAX || l4 > OFFSET_MAX)
		return XDP_DROP; /* verifier: they never are */
	udp = cursor.frame + l4;
	if ((void *)(udp + 1) > cursor.end)
		return XDP_DROP; /* verifier: it is there */
	if (packet->is_ipv6) {
		ipv6 = cursor.frame + l3;
		if ((void *)(ipv6 + 1) > cursor.end)
			return XDP_DROP; /* verifier: it is there */
		if (decrement_hop_limit(ipv6))
			return drop_for(FAILURE_HOP_LIMIT);
		write_ipv6_addresses(ipv6, &to->source, &to->destination);
		translate_udp(udp, packet, to);
	} else {
		ip = cursor.frame + l3;
		if ((void *)(ip + 1) > cursor.end)
			return XDP_DROP; /* verifier: it is there */
		if (decrement_ttl(ip))
			return drop_for(FAILURE_HOP_LIMIT);
		translate_ports(udp, to, (__u64)ip->saddr + ip->daddr,
				(__u64)to->source.words[3] + to->destination.words[3]);
		translate_ipv4(ip, to);
	}
	address_frame(cursor, mac);
	return XDP_TX;
}

/*
 * Rewrites a UDP packet into the other family: the IP header is replaced, and its options or extension headers are left
 * out. MAC addresses are for the caller to write. Returns an XDP action, and has then counted what went wrong.
 */
__noinline int change_family(struct xdp_md *ctx, struct packet *packet, struct translation *to)
{
	struct cursor cursor = frame_of(ctx);
	__u32 l3, l4, octets, length;
	__u8 hops, traffic_class;
	struct ipv6hdr *ipv6;
	struct udphdr *udp;
	struct iphdr *ip;

	if (!packet || !to)
		return XDP_DROP; /* verifier: they are there */
	l3 = packet->l3;
	l4 = packet->l4;
	if (l3 > L3_MAX || l4 > OFFSET_MAX)
		return XDP_DROP; /* verifier: they never are */
	ip = cursor.frame + l3;
	udp = cursor.frame + l4;
	if ((void *)(ip + 1) > cursor.end || (void *)(udp + 1) > cursor.end)
		return XDP_DROP; /* verifier: they are there */
	if (packet->is_ipv6) {
		ipv6 = (void *)ip;
		traffic_class = ipv6_traffic_class(ipv6);
		hops = ipv6->hop_limit;
	} else {
		traffic_class = ip->tos;
		hops = ip->ttl;
	}
	if (hops <= 1)
		return drop_for(FAILURE_HOP_LIMIT);
	if (!udp->check)
		return drop_for(FAILURE_NO_CHECKSUM);
	translate_udp(udp, packet, to);

	octets = to->is_ipv6 ? sizeof(*ipv6) : sizeof(*ip);
	length = packet->ip_length - (l4 - l3) + octets;
	if (move_start(ctx, l3, (int)(octets - (l4 - l3))))
		return drop_for(FAILURE_TOO_LARGE); /* no room before the frame */
	cursor = frame_of(ctx);
	if (to->is_ipv6) {
		ipv6 = new_ip_header(cursor, l3, sizeof(*ipv6), 1);
		if (!ipv6)
			return XDP_DROP; /* verifier: it is there */
		write_ipv6(ipv6, &to->source, &to->destination, IPPROTO_UDP, hops - 1, traffic_class, length, 0);
	} else {
		ip = new_ip_header(cursor, l3, sizeof(*ip), 0);
		if (!ip)
			return XDP_DROP; /* verifier: it is there */
		write_ipv4(ip, &to->source, &to->destination, IPPROTO_UDP, hops - 1, traffic_class, length);
	}
	return XDP_TX;
}

/* Rewrites a UDP packet into whatever family. Returns an XDP action, and has then counted what went wrong. */
static __always_inline int send_translated(struct xdp_md *ctx, struct packet *packet, const struct translation *to,
					   const void *mac)
{
	struct translation other;
	int action;

	if (likely(packet->is_ipv6 == to->is_ipv6))
		return translate(ctx, packet, to, mac);
	other = *to; /* the compiler keeps `to` in registers */
	action = change_family(ctx, packet, &other);
	if (action == XDP_TX)
		address_frame(frame_of(ctx), mac);
	return action;
}

/* Whether an address is the one that backends see in nat mode. */
static __always_inline int is_our_source(const union address *address)
{
	const volatile union address *ipv4 = &settings.source_ipv4, *ipv6 = &settings.source_ipv6;

	return (address->halves[0] == ipv4->halves[0] && address->halves[1] == ipv4->halves[1]) ||
	       (address->halves[0] == ipv6->halves[0] && address->halves[1] == ipv6->halves[1]);
}

static __always_inline struct nat_key nat_key(const struct flow *flow, __u32 slot)
{
	struct nat_key key = { .client = flow->client, .local = flow->local, .backend = slot };

	copy_ports(&key.client_port, &flow->client_port);
	return key;
}

static __always_inline struct return_key return_key(const struct backend *backend, __be16 port)
{
	return (struct return_key){ backend->address, backend->port, port, 0 };
}

static __always_inline int same_flow(const struct flow *one, const struct flow *other)
{
	return one->client.halves[0] == other->client.halves[0] && one->client.halves[1] == other->client.halves[1] &&
	       one->local.halves[0] == other->local.halves[0] && one->local.halves[1] == other->local.halves[1] &&
	       one->client_port == other->client_port && one->local_port == other->local_port;
}

/*
 * Takes a port towards a backend that no other flow of this backend has, and no service of ours: answers would be taken
 * for what clients send there. 0 if none of those tried was free.
 */
static __always_inline __be16 take_port(const struct packet *packet, const struct backend *backend, __u32 slot,
					const struct ethhdr *ethernet)
{
	struct nat_return back = { .flow = packet->flow, .backend = slot };
	__u32 hash = flow_hash(&packet->flow);
	union address source;
	struct return_key key;

	source.halves[0] = backend->is_ipv6 ? settings.source_ipv6.halves[0] : settings.source_ipv4.halves[0];
	source.halves[1] = backend->is_ipv6 ? settings.source_ipv6.halves[1] : settings.source_ipv4.halves[1];
	__builtin_memcpy(back.client_mac, ethernet->h_source, ETH_ALEN);
	for (int i = 0; i < PORT_TRIES; i++) {
		key = return_key(backend, bpf_htons(settings.nat_port_first + hash % settings.nat_port_count));
		if (!find_service(&source, key.port) && !bpf_map_update_elem(&nat_in, &key, &back, BPF_NOEXIST))
			return key.port;
		hash = (hash + 1) * (__u32)HASH_MULTIPLIER;
	}
	return 0;
}

/*
 * Begins a flow: from now on its packets to this backend have a port of ours. Returns 0, or -1 if there is none.
 * `moved` is given if the flow begins with a routable CID on a short header: its client has moved.
 */
__noinline int nat_begin(struct xdp_md *ctx, struct packet *packet, __u32 slot, struct service *moved)
{
	struct backend *backend = bpf_map_lookup_elem(&backends, &slot);
	struct cursor cursor = frame_of(ctx);
	struct ethhdr *ethernet = cursor.frame;
	struct service_counters *counted;
	struct nat_flow flow = {};
	struct nat_key key;

	if (!packet || !backend || (void *)(ethernet + 1) > cursor.end)
		return -1; /* verifier: they are there */
	flow.port = take_port(packet, backend, slot, ethernet);
	if (!flow.port)
		return -1;
	flow.incarnation = backend->incarnation;
	__builtin_memcpy(flow.client_mac, ethernet->h_source, ETH_ALEN);
	key = nat_key(&packet->flow, slot);
	if (bpf_map_update_elem(&nat_out, &key, &flow, BPF_ANY))
		return -1;
	if (!moved)
		return 0;
	counted = bpf_map_lookup_elem(&service_count, &moved->index);
	if (counted) {
		counted->moves++;
		counted->rescued += fallback(moved, &packet->flow) != slot;
	}
	return 0;
}

/* Whether the way back of a flow is still there, and nobody else's. */
static __always_inline int has_way_back(const struct packet *packet, const struct backend *backend,
					const struct nat_flow *flow)
{
	struct return_key key = return_key(backend, flow->port);
	struct nat_return *back = bpf_map_lookup_elem(&nat_in, &key);

	return back && same_flow(&back->flow, &packet->flow);
}

/* Notes that a client is behind another MAC address, a router's perhaps. */
static __always_inline void follow_client(const struct backend *backend, struct nat_flow *flow, const void *mac)
{
	struct return_key key = return_key(backend, flow->port);
	struct nat_return *back = bpf_map_lookup_elem(&nat_in, &key);

	copy_mac(flow->client_mac, mac);
	if (back)
		copy_mac(back->client_mac, mac);
}

/* Remembers the CID of a short header: if its server dies, its client is told. */
static __always_inline void note_cid(struct xdp_md *ctx, const struct packet *packet, struct nat_flow *flow)
{
	__u32 at = packet->dcid, length = packet->dcid_length < MAX_CID ? packet->dcid_length : MAX_CID;
	struct cursor cursor = frame_of(ctx);
	const __u8 *cid = cursor.frame + (at & OFFSET_MAX);

	flow->cid_octets = length;
	if (likely((const void *)(cid + MAX_CID) <= cursor.end)) {
		*(__u64 *)flow->cid = *(const __u64 *)cid;
		*(__u64 *)(flow->cid + 8) = *(const __u64 *)(cid + 8);
		*(__u32 *)(flow->cid + 16) = *(const __u32 *)(cid + 16);
		return;
	}
	barrier_var(length); /* verifier: it is to see the comparison of what is passed on */
	if (length > 0)
		bpf_xdp_load_bytes(ctx, at, flow->cid, length);
}

#define NO_FLOW (-1)

/* A client's packet to a backend, if it has a port for that. Returns NO_FLOW, or an XDP action. */
static __noinline int nat_send_on(struct xdp_md *ctx, struct packet *packet, const struct found *found, int is_by_cid)
{
	const struct backend *backend = found->backend;
	struct nat_key key = nat_key(&packet->flow, found->slot);
	struct nat_flow *flow = bpf_map_lookup_elem(&nat_out, &key);
	struct translation to;
	struct cursor cursor;

	if (unlikely(!flow || flow->incarnation != backend->incarnation ||
		     (flow->datagrams_to % PORT_CHECK_EVERY == 0 && !has_way_back(packet, backend, flow))))
		return NO_FLOW;
	cursor = frame_of(ctx);
	if (cursor.frame + ETH_HLEN > cursor.end)
		return XDP_DROP; /* verifier: it is there */
	if (unlikely(!same_mac(flow->client_mac, cursor.frame + ETH_ALEN)))
		follow_client(backend, flow, cursor.frame + ETH_ALEN);
	flow->datagrams_to++;
	if (!packet->is_long) {
		flow->short_header_seen = 1;
		if (is_by_cid)
			note_cid(ctx, packet, flow);
	}

	to.is_ipv6 = backend->is_ipv6;
	to.source.halves[0] = to.is_ipv6 ? settings.source_ipv6.halves[0] : settings.source_ipv4.halves[0];
	to.source.halves[1] = to.is_ipv6 ? settings.source_ipv6.halves[1] : settings.source_ipv4.halves[1];
	to.destination = backend->address;
	to.source_port = flow->port;
	to.destination_port = backend->port;
	return send_translated(ctx, packet, &to, backend->next_hop);
}

/*
 * Mode nat: a client's packet to a backend, from a port of ours. Returns an XDP action, and has then counted what went
 * wrong.
 */
static __always_inline int nat_send(struct xdp_md *ctx, struct packet *packet, struct service *service,
				    const struct found *found, __u32 verdict)
{
	int is_by_cid = verdict == VERDICT_CID || verdict == VERDICT_CID_DOWN;
	int action = nat_send_on(ctx, packet, found, is_by_cid);

	if (likely(action != NO_FLOW))
		return action;
	if (nat_begin(ctx, packet, found->slot, is_by_cid && !packet->is_long ? service : NULL))
		return drop_for(FAILURE_NO_SOCKET);
	action = nat_send_on(ctx, packet, found, is_by_cid);
	return action != NO_FLOW ? action : drop_for(FAILURE_NO_SOCKET);
}

static __always_inline void count_return(__u32 slot, const struct packet *packet)
{
	struct backend_counters *counted = bpf_map_lookup_elem(&backend_count, &slot);

	if (!counted)
		return;
	counted->datagrams_from++;
	counted->octets_from += packet->payload_length;
}

/* Mode nat: a backend's packet to its client. Returns XDP_PASS if it is nobody's. */
static __noinline int nat_return(struct xdp_md *ctx, struct packet *packet)
{
	struct return_key key = { packet->flow.client, packet->flow.client_port, packet->flow.local_port, 0 };
	struct nat_return *back = bpf_map_lookup_elem(&nat_in, &key);
	struct translation to;
	int action;

	if (!back)
		return XDP_PASS;
	to.is_ipv6 = !is_ipv4_mapped(&back->flow.client);
	to.source = back->flow.local;
	to.destination = back->flow.client;
	to.source_port = back->flow.local_port;
	to.destination_port = back->flow.client_port;
	back->datagrams_from++;
	if (unlikely(packet->ip_length + growth(packet, to.is_ipv6) > (int)settings.interface_mtu)) {
		drop_for(FAILURE_TOO_LARGE);
		return send_too_big(ctx, packet, settings.interface_mtu - growth(packet, to.is_ipv6));
	}
	action = send_translated(ctx, packet, &to, back->client_mac);
	if (action == XDP_TX)
		count_return(back->backend, packet);
	return action;
}

/* Mode dnat: a client's packet to a backend, which sees the client's address. */
static __noinline int dnat_send(struct xdp_md *ctx, struct packet *packet, const struct backend *backend)
{
	struct translation to;

	to.is_ipv6 = packet->is_ipv6;
	to.source = packet->flow.client;
	to.destination = backend->address;
	to.source_port = packet->flow.client_port;
	to.destination_port = backend->port;
	return translate(ctx, packet, &to, backend->next_hop);
}

/*
 * Mode dnat: a backend's packet to a client, for which we are the router. It leaves by the interface it came by, or the
 * stack has it as it is: to find out the client's next hop, to say that there is no way, or to send it elsewhere.
 */
__noinline int dnat_return(struct xdp_md *ctx, struct packet *packet)
{
	struct bpf_fib_lookup route = {};
	struct dnat_return *known;
	struct endpoint backend = {};
	struct translation to;
	__u64 mac = 0;
	int action;

	if (!packet)
		return XDP_PASS; /* verifier: it is there */
	backend.address = packet->flow.client;
	backend.port = packet->flow.client_port;
	known = bpf_map_lookup_elem(&dnat_returns, &backend);
	if (!known)
		return XDP_PASS;

	route.l4_protocol = IPPROTO_UDP;
	route.sport = known->port;
	route.dport = packet->flow.local_port;
	route.tot_len = packet->ip_length;
	route.ifindex = ctx->ingress_ifindex;
	if (packet->is_ipv6) {
		route.family = FAMILY_IPV6;
		__builtin_memcpy(route.ipv6_src, &known->address, sizeof(route.ipv6_src));
		__builtin_memcpy(route.ipv6_dst, &packet->flow.local, sizeof(route.ipv6_dst));
	} else {
		route.family = FAMILY_IPV4;
		route.ipv4_src = known->address.words[3];
		route.ipv4_dst = packet->flow.local.words[3];
	}
	if (bpf_fib_lookup(ctx, &route, sizeof(route), 0) != BPF_FIB_LKUP_RET_SUCCESS ||
	    route.ifindex != ctx->ingress_ifindex)
		return XDP_PASS;

	to.is_ipv6 = packet->is_ipv6;
	to.source = known->address;
	to.destination = packet->flow.local;
	to.source_port = known->port;
	to.destination_port = packet->flow.local_port;
	__builtin_memcpy(&mac, route.dmac, ETH_ALEN); /* verifier: aligned, as it wants the stack to be read */
	action = translate(ctx, packet, &to, &mac);
	if (action == XDP_TX)
		count_return(known->backend, packet);
	return action;
}
