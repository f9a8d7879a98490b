/*
 * Internet checksums (RFC 1071) and what becomes of them when a packet changes (RFC 1624). Sums are of 16-bit words as
 * they lie in memory; wider words may be added as they are, since 2^16 is 1 modulo 0xffff. For the same reason the sum
 * of an IPv4-mapped address is that of the IPv4 address.
 */
#pragma once
#include "bpf.h"
#include "shared.h"

#define SUM_MODULUS 0xffffffffffffULL /* a multiple of 0xffff, greater than any sum of a packet's header */

static __always_inline __u16 checksum_fold(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16);
}

static __always_inline __u64 checksum_sum_address(const union address *address)
{
	return (__u64)address->words[0] + address->words[1] + address->words[2] + address->words[3];
}

/* What checksums of UDP and ICMPv6 cover besides what they head (RFC 768; RFC 8200, section 8.1). */
static __always_inline __u64 checksum_sum_pseudo_header(const struct flow *flow, __u8 protocol, __u32 length)
{
	return checksum_sum_address(&flow->client) + checksum_sum_address(&flow->local) + bpf_htons(protocol) +
	       bpf_htons(length);
}

/* UDP's checksum of what sums up to `sum`: 0 would say that there is none (RFC 768). */
static __always_inline __u16 checksum_of_udp(__u64 sum)
{
	__u16 checksum = ~checksum_fold(sum);

	return checksum ? checksum : 0xffff;
}

/* RFC 1624, equation 3: the checksum of a header from which one sum went and to which another came. */
static __always_inline __u16 checksum_update(__u16 checksum, __u64 gone, __u64 come)
{
	return ~checksum_fold((__u16)~checksum + SUM_MODULUS - gone + come);
}

/* The same for UDP, where 0 stands for no checksum and is sent as ones (RFC 768). */
static __always_inline __u16 checksum_update_udp(__u16 checksum, __u64 gone, __u64 come)
{
	__u16 updated = checksum_update(checksum, gone, come);

	if (!checksum)
		return 0;
	return updated ? updated : 0xffff;
}
