/*
 * What was found in a frame. Offsets, and no pointers: they outlive a change of the frame, and fit a function that the
 * verifier checks by itself.
 */
#pragma once
#include "shared.h"

enum fragment {
	NO_FRAGMENT,
	FIRST_FRAGMENT,
	LATER_FRAGMENT, /* has no ports */
};

struct packet {
	struct flow flow; /* as seen from the client: source and destination */
	__u16 l3; /* offsets from the start of the frame: of the IP header, */
	__u16 l4; /* of the UDP or ICMP header, */
	__u16 payload; /* and of what follows it */
	__u16 payload_length; /* octets of it that belong to the packet */
	__u16 ip_length; /* of the whole IP packet */
	__u16 dcid; /* offset of a QUIC packet's; what follows it up to dcid_length is its */
	__u8 dcid_length; /* of a long header; of a short one: what follows the first octet, 255 at most */
	__u8 is_long; /* QUIC's header form */
	__u8 is_ipv6;
	__u8 protocol; /* UDP, ICMP or ICMPv6 */
	__u8 fragment; /* enum fragment */
	__u8 is_malformed; /* UDP's length is impossible, or the frame ends before the IP packet does */
	__u16 quoted_l4; /* offset, in an ICMP error: of the UDP header that it quotes */
};

/* Where a packet begins in the frame: an Ethernet header and at most two VLAN tags are before it. */
#define L3_MAX 22
/* verifier: where anything may begin that is looked at */
#define OFFSET_MAX 0x3fff
