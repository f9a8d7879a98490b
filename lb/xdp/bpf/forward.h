/*
 * How a packet leaves, in whatever mode: by another MAC address, or inside another packet. These functions take any IP
 * packet at packet->l3, ICMP too. They return an XDP action, and have then counted what went wrong.
 */
#pragma once
#include "checksum.h"
#include "count.h"
#include "maps.h"
#include "parse.h"

#define GUE_PORT 6080 /* draft-ietf-intarea-gue, section 6 */
#define GUE_SOURCE_PORTS 0xc000 /* the dynamic ones */
#define OUTER_TTL 64
#define IPV4_VERSION_IHL 0x45
#define FLOW_LABEL 0xfffff

/* Of icmp.h, which needs this file: tells the sender of a packet how long it may be. Returns an XDP action. */
__noinline int send_too_big(struct xdp_md *ctx, struct packet *packet, __u32 mtu);

/* A hash of a 4-tuple for those who spread packets over links and ports; it tells nobody anything. */
static __always_inline __u32 flow_hash(const struct flow *flow)
{
	__u64 hash = settings.hash_seed;

	hash = (hash ^ flow->client.halves[0] ^ flow->client.halves[1]) * HASH_MULTIPLIER;
	hash ^= hash >> 32;
	hash = (hash ^ flow->local.halves[1] ^ ((__u32)flow->client_port << 16 | flow->local_port)) * HASH_MULTIPLIER;
	return hash >> 32;
}

static __always_inline void copy_mac(void *to, const volatile void *from)
{
	*(__u32 *)to = *(const volatile __u32 *)from;
	*(__u16 *)(to + 4) = *(const volatile __u16 *)(from + 4);
}

static __always_inline int same_mac(const void *one, const void *other)
{
	return *(const __u32 *)one == *(const __u32 *)other && *(const __u16 *)(one + 4) == *(const __u16 *)(other + 4);
}

static __always_inline int is_resolved(const struct backend *backend)
{
	return *(const __u32 *)backend->next_hop || *(const __u16 *)(backend->next_hop + 4);
}

/* From us to `mac`. */
static __always_inline void address_frame(struct cursor cursor, const void *mac)
{
	struct ethhdr *ethernet = cursor.frame;

	if ((void *)(ethernet + 1) > cursor.end) /* verifier: it never is */
		return;
	copy_mac(ethernet->h_dest, mac);
	copy_mac(ethernet->h_source, settings.interface_mac);
}

/* As a router does. Returns -1 if the packet has come as far as it may. */
static __always_inline int decrement_ttl(struct iphdr *ip)
{
	__u32 checksum = ip->check;

	if (ip->ttl <= 1)
		return -1;
	ip->ttl--;
	/* RFC 1141: the TTL is the high octet of its word. */
	checksum += bpf_htons(0x0100);
	ip->check = checksum + (checksum >= 0xffff);
	return 0;
}

static __always_inline int decrement_hop_limit(struct ipv6hdr *ip)
{
	if (ip->hop_limit <= 1)
		return -1;
	ip->hop_limit--;
	return 0;
}

static __always_inline __u8 ipv6_traffic_class(const struct ipv6hdr *ip)
{
	return bpf_ntohl(*(const __be32 *)ip) >> 20;
}

static __always_inline void write_ipv6_addresses(struct ipv6hdr *ip, const volatile union address *source,
						 const union address *destination)
{
	__u64 *halves = (void *)&ip->saddr;

	halves[0] = source->halves[0];
	halves[1] = source->halves[1];
	halves[2] = destination->halves[0];
	halves[3] = destination->halves[1];
}

/*
 * Makes room for `octets` more (or fewer, if negative) between Ethernet header and IP header, and moves VLAN tags. MAC
 * addresses and the EtherType are for the caller to write. Pointers into the frame are void afterwards. Returns 0 or
 * -1.
 */
static __always_inline int move_start(struct xdp_md *ctx, __u32 l3, int octets)
{
	struct cursor cursor = frame_of(ctx);
	__u32 *tags = cursor.frame + 2 * ETH_ALEN, first, second;

	if (likely(l3 == ETH_HLEN))
		return bpf_xdp_adjust_head(ctx, -octets);
	barrier_var(tags); /* verifier: it does not know what the compiler knows of pointers behind this one */
	if ((void *)(tags + 2) > cursor.end)
		return -1;
	first = tags[0];
	second = tags[1];
	if (bpf_xdp_adjust_head(ctx, -octets))
		return -1;
	cursor = frame_of(ctx);
	tags = cursor.frame + 2 * ETH_ALEN;
	if ((void *)(tags + 2) > cursor.end)
		return -1;
	tags[0] = first;
	if (l3 > ETH_HLEN + sizeof(struct vlan_tag))
		tags[1] = second;
	return 0;
}

/* Octets that a tunnel puts before a packet. */
static __always_inline __u32 encapsulation(int is_ipv6)
{
	__u32 octets = is_ipv6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr);

	return settings.forward_mode == FORWARD_GUE ? octets + sizeof(struct udphdr) : octets;
}

/* How many octets longer a packet is when it leaves for a backend, or, if negative, shorter. */
static __always_inline int growth(const struct packet *packet, int is_ipv6)
{
	int ip = is_ipv6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr);

	if (settings.forward_mode == FORWARD_IPIP || settings.forward_mode == FORWARD_GUE)
		return encapsulation(is_ipv6);
	if (settings.forward_mode == FORWARD_NAT && packet->is_ipv6 != is_ipv6)
		return ip - (packet->l4 - packet->l3);
	return 0;
}

/* Writes the EtherType of a frame whose IP header begins at `l3`, and returns that: NULL if `octets` are not there. */
static __always_inline void *new_ip_header(struct cursor cursor, __u32 l3, __u32 octets, int is_ipv6)
{
	__u32 type_at = l3 - sizeof(__be16);
	__be16 *type;

	barrier_var(type_at); /* verifier: one pointer for both */
	if (type_at > L3_MAX)
		return NULL; /* verifier: it never is */
	type = cursor.frame + type_at;
	if ((void *)(type + 1) + octets > cursor.end)
		return NULL;
	*type = is_ipv6 ? bpf_htons(ETH_P_IPV6) : bpf_htons(ETH_P_IP);
	return type + 1;
}

/* A whole header, for a packet of `length` octets with it. */
static __always_inline void write_ipv4(struct iphdr *ip, const volatile union address *source,
				       const union address *destination, __u8 protocol, __u8 ttl, __u8 traffic_class,
				       __u32 length)
{
	__u32 *words = (void *)ip;
	__u64 sum;

	words[0] = IPV4_VERSION_IHL | traffic_class << 8 | (__u32)bpf_htons(length) << 16;
	words[1] = bpf_htonl(IPV4_DONT_FRAGMENT); /* and ID 0: nobody fragments it (RFC 6864, section 4.1) */
	words[2] = ttl | protocol << 8;
	words[3] = source->words[3];
	words[4] = destination->words[3];
	sum = (__u64)words[0] + words[1] + words[2] + words[3] + words[4];
	ip->check = ~checksum_fold(sum);
}

static __always_inline void write_ipv6(struct ipv6hdr *ip, const volatile union address *source,
				       const union address *destination, __u8 protocol, __u8 hop_limit,
				       __u8 traffic_class, __u32 length, __u32 hash)
{
	*(__be32 *)ip = bpf_htonl(6 << 28 | traffic_class << 20 | (hash & FLOW_LABEL)); /* RFC 6438 */
	ip->payload_len = bpf_htons(length - sizeof(*ip));
	ip->nexthdr = protocol;
	ip->hop_limit = hop_limit;
	write_ipv6_addresses(ip, source, destination);
}

/* Without a checksum, over IPv6 too (RFC 6935): what is inside has its own. */
static __always_inline void write_outer_udp(struct udphdr *udp, __u32 length, __u32 hash)
{
	udp->source = bpf_htons(GUE_SOURCE_PORTS | (hash & 0x3fff));
	udp->dest = bpf_htons(GUE_PORT);
	udp->len = bpf_htons(length);
	udp->check = 0;
}

static __always_inline int encapsulate(struct xdp_md *ctx, const struct packet *packet, const struct backend *backend,
				       const int is_ipv6, __u8 traffic_class)
{
	__u32 l3 = packet->l3, octets = encapsulation(is_ipv6), length = packet->ip_length + octets;
	__u8 protocol = packet->is_ipv6 ? IPPROTO_IPV6 : IPPROTO_IPIP;
	struct cursor cursor;
	__u32 hash = 0;
	void *outer;

	if (settings.forward_mode == FORWARD_GUE || is_ipv6)
		hash = flow_hash(&packet->flow);
	if (move_start(ctx, l3, octets))
		return drop_for(FAILURE_TOO_LARGE); /* no room before the frame */
	cursor = frame_of(ctx);
	outer = new_ip_header(cursor, l3, octets, is_ipv6);
	if (!outer)
		return XDP_DROP; /* verifier: it is there */
	if (settings.forward_mode == FORWARD_GUE) {
		protocol = IPPROTO_UDP;
		write_outer_udp(outer + octets - sizeof(struct udphdr), length - octets + sizeof(struct udphdr), hash);
	}
	if (is_ipv6)
		write_ipv6(outer, &settings.source_ipv6, &backend->address, protocol, OUTER_TTL, traffic_class, length,
			   hash);
	else
		write_ipv4(outer, &settings.source_ipv4, &backend->address, protocol, OUTER_TTL, traffic_class, length);
	address_frame(cursor, backend->next_hop);
	return XDP_TX;
}

/*
 * Modes l2, ipip and gue: an IP packet as it is, its TTL one less, to a backend. Whether its next hop is known, and
 * whether the packet may be so long, is for the caller to say.
 */
static __always_inline int send_whole(struct xdp_md *ctx, const struct packet *packet, const struct backend *backend)
{
	struct cursor cursor = frame_of(ctx);
	__u32 l3 = packet->l3, traffic_class;
	struct ipv6hdr *ipv6;
	struct iphdr *ip;

	if (l3 > L3_MAX)
		return XDP_DROP; /* verifier: it never is */
	if (packet->is_ipv6) {
		ipv6 = cursor.frame + l3;
		if ((void *)(ipv6 + 1) > cursor.end)
			return XDP_DROP; /* verifier: it is there */
		if (decrement_hop_limit(ipv6))
			return drop_for(FAILURE_HOP_LIMIT);
		traffic_class = ipv6_traffic_class(ipv6);
	} else {
		ip = cursor.frame + l3;
		if ((void *)(ip + 1) > cursor.end)
			return XDP_DROP; /* verifier: it is there */
		if (decrement_ttl(ip))
			return drop_for(FAILURE_HOP_LIMIT);
		traffic_class = ip->tos;
	}
	if (settings.forward_mode == FORWARD_L2) {
		address_frame(cursor, backend->next_hop);
		return XDP_TX;
	}
	return backend->is_ipv6 ? encapsulate(ctx, packet, backend, 1, traffic_class) :
				  encapsulate(ctx, packet, backend, 0, traffic_class);
}
