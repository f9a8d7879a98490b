/*
 * Packets of our own, back to where a packet came from: what stateless resets and ICMP errors have in common.
 */
#pragma once
#include "checksum.h"
#include "forward.h"
#include "packet.h"
#include "parse.h"

#define ANSWER_TTL 64 /* RFC 1700 */
#define TRANSPORT_HEADER 8 /* octets: UDP's, ICMP's and ICMPv6's are all as long */

/*
 * Whether a source address can be one host's: nobody else is answered (RFC 1122, section 3.2.2; RFC 4443, section 2.4).
 * Loopback can: no stack takes it from a wire, and tests live there.
 */
static __always_inline int is_answerable(const union address *client)
{
	__u8 ipv4 = client->octets[12];

	if (!client->halves[0] && client->words[2] == bpf_htonl(0xffff))
		return ipv4 > 0 && ipv4 < 224;
	return client->octets[0] != 0xff && (client->halves[0] || client->halves[1]);
}

/*
 * Writes the IP header of an answer at packet->l3, without options or extensions, for `length` octets that follow it.
 * Returns where they begin, NULL if not even a transport header is there.
 */
static __always_inline void *write_answer(struct cursor cursor, const struct packet *packet, __u8 protocol,
					  __u32 length)
{
	const struct flow *flow = &packet->flow;
	struct ipv6hdr *ipv6;
	struct iphdr *ipv4;

	if (packet->is_ipv6) {
		ipv6 = new_ip_header(cursor, packet->l3, sizeof(*ipv6) + TRANSPORT_HEADER, 1);
		if (!ipv6)
			return NULL;
		write_ipv6(ipv6, &flow->local, &flow->client, protocol, ANSWER_TTL, 0, sizeof(*ipv6) + length, 0);
		return ipv6 + 1;
	}
	ipv4 = new_ip_header(cursor, packet->l3, sizeof(*ipv4) + TRANSPORT_HEADER, 0);
	if (!ipv4)
		return NULL;
	write_ipv4(ipv4, &flow->local, &flow->client, protocol, ANSWER_TTL, 0, sizeof(*ipv4) + length);
	return ipv4 + 1;
}
