/*
 * RFC 8999: the part of a QUIC packet that no version changes, and nothing else. The C twin of lb/packet.py, which says
 * what this file must never learn. It has no map and no helper.
 */
#pragma once
#include "bpf.h"

/* RFC 8999, section 5.1. */
#define LONG_HEADER 0x80
#define DCID_LENGTH_AT 5
#define MIN_LONG_HEADER 7 /* first octet, version, two empty CIDs */

struct quic_header {
	__u32 is_long;
	__u32 dcid; /* octets from the start of the UDP payload */
	__u32 dcid_length; /* of a short header: all the rest */
};

/*
 * Reads the header of a UDP payload of `length` octets, at least 1. Returns 0, or -1 if the payload ends before the
 * header does. What lies at `end` is not read: a long header that is not all in the first buffer of its frame ends
 * there.
 */
static __always_inline int parse_quic(const __u8 *payload, const void *end, __u32 length, struct quic_header *header)
{
	const __u8 *scid_length;
	__u32 dcid_end;

	if ((const void *)(payload + 1) > end)
		return -1;
	header->is_long = payload[0] & LONG_HEADER;
	if (!header->is_long) {
		header->dcid = 1;
		header->dcid_length = length - 1;
		return 0;
	}
	if (length < MIN_LONG_HEADER || (const void *)(payload + MIN_LONG_HEADER) > end)
		return -1;
	header->dcid = DCID_LENGTH_AT + 1;
	header->dcid_length = payload[DCID_LENGTH_AT];
	dcid_end = header->dcid + header->dcid_length;
	scid_length = payload + dcid_end;
	if (length <= dcid_end || (const void *)(scid_length + 1) > end || length < dcid_end + 1 + *scid_length)
		return -1;
	return 0;
}
