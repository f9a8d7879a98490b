/*
 * From the first octet of a frame to UDP's payload: Ethernet, VLAN tags, IPv4, IPv6, UDP. It decides nothing: what it
 * does not understand is for the stack.
 *
 * Each function takes what the one before it left, moves the cursor behind its own header and returns the number of the
 * next protocol, or NOT_OURS.
 */
#pragma once
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/udp.h>
#include "bpf.h"
#include "packet.h"

#define NOT_OURS (-1)

#define VLAN_TAGS 2
#define EXTENSION_HEADERS 8 /* bounds the loop */

#define IPV4_DONT_FRAGMENT 0x4000
#define IPV4_FRAGMENT 0x3fff /* more fragments, and the offset */
#define IPV4_FRAGMENT_OFFSET 0x1fff
#define IPV6_FRAGMENT_OFFSET 0xfff8

struct cursor {
	void *frame;
	void *end;
	__u32 at; /* octets from `frame` */
};

struct vlan_tag {
	__be16 tci;
	__be16 type;
};

struct extension_header {
	__u8 next;
	__u8 length; /* in units of 8 octets, the first one not counted */
	__u8 type;
	__u8 segments_left; /* routing header: not 0 if the packet has not arrived yet */
};

struct fragment_header {
	__u8 next;
	__u8 zero;
	__be16 offset;
	__be32 id;
};

static __always_inline struct cursor frame_of(struct xdp_md *ctx)
{
	return (struct cursor){ (void *)(long)ctx->data, (void *)(long)ctx->data_end, 0 };
}

static __always_inline int is_vlan(int type)
{
	return type == bpf_htons(ETH_P_8021Q) || type == bpf_htons(ETH_P_8021AD);
}

/* Returns the EtherType, in network order. */
static __always_inline int parse_ethernet(struct cursor *cursor)
{
	struct ethhdr *ethernet = cursor->frame;
	int type;

	if ((void *)(ethernet + 1) > cursor->end)
		return NOT_OURS;
	cursor->at = sizeof(*ethernet);
	type = *(__be16 *)(cursor->frame + 2 * ETH_ALEN); /* the struct is packed: octet by octet, to a compiler */
	for (int i = 0; i < VLAN_TAGS && unlikely(is_vlan(type)); i++) {
		struct vlan_tag *tag = cursor->frame + cursor->at;

		if ((void *)(tag + 1) > cursor->end)
			return NOT_OURS;
		cursor->at += sizeof(*tag);
		type = tag->type;
	}
	return type;
}

static __always_inline void set_ipv4(union address *address, __be32 ipv4)
{
	address->halves[0] = 0;
	address->halves[1] = (__u64)ipv4 << 32 | bpf_htonl(0xffff);
}

static __always_inline void set_ipv6(union address *address, const struct in6_addr *ipv6)
{
	const __u64 *halves = (const void *)ipv6;

	address->halves[0] = halves[0];
	address->halves[1] = halves[1];
}

static __always_inline int parse_ipv4(struct cursor *cursor, struct packet *packet)
{
	struct iphdr *ip = cursor->frame + cursor->at;

	if ((void *)(ip + 1) > cursor->end || ip->version != 4 || ip->ihl < 5)
		return NOT_OURS;
	packet->is_ipv6 = 0;
	packet->l3 = cursor->at;
	packet->ip_length = bpf_ntohs(ip->tot_len);
	set_ipv4(&packet->flow.client, ip->saddr);
	/* In two halves: behind an Ethernet header it lies across two words, and a load of what was stored in two waits. */
	set_ipv4(&packet->flow.local, *(volatile __u16 *)&ip->daddr | *((volatile __u16 *)&ip->daddr + 1) << 16);
	packet->fragment = NO_FRAGMENT;
	if (unlikely(ip->frag_off & bpf_htons(IPV4_FRAGMENT)))
		packet->fragment = ip->frag_off & bpf_htons(IPV4_FRAGMENT_OFFSET) ? LATER_FRAGMENT : FIRST_FRAGMENT;
	cursor->at += ip->ihl * 4;
	return ip->protocol;
}

/* RFC 8200, section 4. Of the headers that may precede UDP, those for encryption and mobility are not looked behind. */
static __always_inline int skip_extension_headers(struct cursor *cursor, struct packet *packet, int next)
{
	for (int i = 0; i < EXTENSION_HEADERS; i++) {
		struct extension_header *extension = cursor->frame + cursor->at;
		struct fragment_header *fragment = (void *)extension;

		if (next == IPPROTO_FRAGMENT) {
			if ((void *)(fragment + 1) > cursor->end)
				return NOT_OURS;
			packet->fragment = fragment->offset & bpf_htons(IPV6_FRAGMENT_OFFSET) ? LATER_FRAGMENT : FIRST_FRAGMENT;
			cursor->at += sizeof(*fragment);
			return fragment->next;
		}
		if (next != IPPROTO_HOPOPTS && next != IPPROTO_ROUTING && next != IPPROTO_DSTOPTS)
			return next;
		if ((void *)(extension + 1) > cursor->end)
			return NOT_OURS;
		if (next == IPPROTO_ROUTING && extension->segments_left)
			return NOT_OURS;
		cursor->at += 8 * (1 + extension->length);
		next = extension->next;
	}
	return next;
}

static __always_inline int is_ipv4_mapped(const union address *address)
{
	return !address->halves[0] && address->words[2] == bpf_htonl(0xffff);
}

static __always_inline int parse_ipv6(struct cursor *cursor, struct packet *packet)
{
	struct ipv6hdr *ip = cursor->frame + cursor->at;
	int next;

	if ((void *)(ip + 1) > cursor->end || ip->version != 6)
		return NOT_OURS;
	packet->is_ipv6 = 1;
	packet->l3 = cursor->at;
	packet->ip_length = sizeof(*ip) + bpf_ntohs(ip->payload_len);
	set_ipv6(&packet->flow.client, &ip->saddr);
	set_ipv6(&packet->flow.local, &ip->daddr);
	/* On no wire: here they would be IPv4 addresses. */
	if (unlikely(is_ipv4_mapped(&packet->flow.client) || is_ipv4_mapped(&packet->flow.local)))
		return NOT_OURS;
	packet->fragment = NO_FRAGMENT;
	next = ip->nexthdr;
	cursor->at += sizeof(*ip);
	if (unlikely(next != IPPROTO_UDP && next != IPPROTO_ICMPV6))
		next = skip_extension_headers(cursor, packet, next);
	return next;
}

/* The packet as far as its transport protocol, which it returns. */
static __always_inline int parse_ip(struct cursor *cursor, struct packet *packet)
{
	int type = parse_ethernet(cursor), protocol;

	if (type == bpf_htons(ETH_P_IP))
		protocol = parse_ipv4(cursor, packet);
	else if (type == bpf_htons(ETH_P_IPV6))
		protocol = parse_ipv6(cursor, packet);
	else
		return NOT_OURS;
	packet->protocol = protocol;
	packet->l4 = cursor->at;
	return protocol;
}

/* Both ports at once: a hash loads them as one word, which would wait for two stores. */
static __always_inline void copy_ports(__be16 *to, const void *from)
{
	*(__u32 *)to = *(const __u32 *)from;
}

/* Returns 0, or NOT_OURS. Lengths that cannot be are noted, and for those to judge who know whose packet it is. */
static __always_inline int parse_udp(struct xdp_md *ctx, struct cursor *cursor, struct packet *packet)
{
	struct udphdr *udp = cursor->frame + cursor->at;
	__u32 headers = cursor->at - packet->l3 + sizeof(*udp);
	__u32 length;

	packet->flow.zero = 0;
	packet->flow.client_port = packet->flow.local_port = 0;
	if (packet->fragment == LATER_FRAGMENT)
		return 0;
	if ((void *)(udp + 1) > cursor->end || packet->ip_length < headers)
		return packet->fragment ? 0 : NOT_OURS;
	copy_ports(&packet->flow.client_port, udp);
	length = bpf_ntohs(udp->len);
	packet->payload_length = length - sizeof(*udp);
	packet->is_malformed = length < sizeof(*udp) || length > packet->ip_length - headers + sizeof(*udp);
	cursor->at += sizeof(*udp);
	packet->payload = cursor->at;
	if (cursor->frame + packet->l3 + packet->ip_length > cursor->end &&
	    bpf_xdp_get_buff_len(ctx) < packet->l3 + packet->ip_length)
		packet->is_malformed = 1;
	return 0;
}
