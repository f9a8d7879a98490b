/*
 * Stateless resets (RFC 9000, section 10.3), written over the packet that asks for one: the C twin of lb/reset.py,
 * which has the reasons for their form and size. They are shorter than what they answer, whatever that is: so two
 * parties that answer each other come to an end, and nobody is sent more octets than were spent in his name.
 */
#pragma once
#include "aes128.h"
#include "answer.h"
#include "limit.h"
#include "maps.h"
#include "packet.h"
#include "token.h"

/* RFC 9000, section 10.3. */
#define MIN_RESET 21
#define ONE_SHORTER_UP_TO 43
#define SHORT_HEADER_FORM 0x40
#define UNPREDICTABLE_BITS 0x3f /* of the first octet */

/* Ours; lb/reset.py has the same. */
#define MAX_RESET 100
#define INCONSPICUOUS 42

#define RESET_BLOCKS (MAX_RESET / AES_BLOCK + 1)

/* What a reset is made in, for each CPU: more than a stack has room for. */
struct reset_work {
	union {
		__u32 words[CID_WORDS];
		__u8 octets[MAX_CID];
	} cid;
	__u32 token[RESET_TOKEN / 4];
	struct token_work token_work;
	/* The last block of unpredictable bits ends under the token. What is not sent is zero, for the checksum. */
	union {
		struct block blocks[RESET_BLOCKS];
		__be32 words[RESET_BLOCKS * AES_BLOCK / 4];
		__u8 octets[RESET_BLOCKS * AES_BLOCK];
	} datagram;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct reset_work);
} reset_work SEC(".maps");

/* How long a reset answering `trigger` octets is; 0 if there is none. */
static __always_inline __u32 reset_size(__u32 trigger)
{
	__u32 largest = trigger - 1;

	if (trigger <= MIN_RESET)
		return 0;
	if (trigger <= ONE_SHORTER_UP_TO)
		return largest;
	if (largest > MAX_RESET)
		largest = MAX_RESET;
	return INCONSPICUOUS + bpf_get_prandom_u32() % (largest - INCONSPICUOUS + 1);
}

/*
 * Loads the CID that a short header's DCID begins with. Returns its length, 0 if it is not all there: whole_cid in
 * lb/routing.py. What is long enough to be answered has as many octets as any CID.
 */
static __noinline __u32 load_whole_cid(struct xdp_md *ctx, const struct packet *packet, const struct service *service,
				       struct reset_work *work)
{
	const struct cid_config *config;
	__u32 index, length;

	if (bpf_xdp_load_bytes(ctx, packet->dcid, &work->cid, sizeof(work->cid)))
		return 0;
	index = service->index * CONFIG_SLOTS + (work->cid.octets[0] >> 5);
	config = bpf_map_lookup_elem(&cid_configs, &index);
	if (!config)
		return 0; /* verifier: all slots exist */
	length = config->cid_length;
	if (config->encodes_length) {
		length = 1 + (work->cid.octets[0] & LENGTH_BITS);
		if (length < config->block_end)
			length = config->block_end;
	}
	return length <= packet->dcid_length && length <= MAX_CID ? length : 0;
}

static __noinline int may_be_sent(const struct service *service, const union address *client)
{
	return is_answerable(client) && reset_allowed(service, client);
}

/*
 * Fills the first octets with unpredictable bits: AES of inputs of which none comes twice under one key. By tables,
 * whatever settings.constant_time says: this key would tell resets from data, and no more.
 */
static __noinline int fill_unpredictable(struct reset_work *work, __u32 octets)
{
	__u32 zero = 0, cpu = bpf_get_smp_processor_id(), random = bpf_get_prandom_u32();
	__u64 *count = bpf_map_lookup_elem(&random_count, &zero);

	if (!count)
		return -1; /* verifier: it is there */
	++*count;
	__builtin_memset(&work->datagram, 0, sizeof(work->datagram));
#pragma nounroll
	for (__u32 i = 0; i < RESET_BLOCKS && i * AES_BLOCK < octets; i++) {
		struct block block = { { *count, *count >> 32, random, cpu << 8 | i } };

		aes128_encrypt((const __u32 *)settings.random_key, &block);
		work->datagram.blocks[i] = block;
	}
	work->datagram.octets[0] = SHORT_HEADER_FORM | (work->datagram.octets[0] & UNPREDICTABLE_BITS);
	return 0;
}

/* The token of a CID of `length` octets, behind what is unpredictable. */
static __noinline int append_token(struct reset_work *work, __u32 at, struct reset_key *key, __u32 length)
{
	if (reset_token(key, work->cid.words, length, &work->token_work, work->token))
		return -1;
	if (at > MAX_RESET - RESET_TOKEN)
		return -1; /* verifier: it never is */
	__builtin_memcpy(&work->datagram.octets[at], work->token, sizeof(work->token));
	return 0;
}

/* Writes a reset over what it answers, and ends the frame there. Returns 0 or -1. */
static __noinline int write_reset(struct xdp_md *ctx, const struct packet *packet, struct reset_work *work, __u32 size)
{
	__u32 ip_header = packet->is_ipv6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr);
	__u32 headers = packet->l3 + ip_header + sizeof(struct udphdr), length = sizeof(struct udphdr) + size;
	__u64 frame_length = bpf_xdp_get_buff_len(ctx);
	const struct flow *flow = &packet->flow;
	struct cursor cursor;
	struct udphdr *udp;
	__u64 sum;

	if (headers + size >= frame_length || bpf_xdp_adjust_tail(ctx, (int)(headers + size - frame_length)))
		return -1; /* verifier: it has got shorter */
	cursor = frame_of(ctx);
	udp = write_answer(cursor, packet, IPPROTO_UDP, length);
	if (!udp || cursor.frame + ETH_HLEN > cursor.end)
		return -1; /* verifier: what was there held more */
	address_frame(cursor, cursor.frame + ETH_ALEN);
	udp->source = flow->local_port;
	udp->dest = flow->client_port;
	udp->len = bpf_htons(length);
	sum = (__u32)bpf_csum_diff(NULL, 0, work->datagram.words, sizeof(work->datagram), 0);
	sum += checksum_sum_pseudo_header(flow, IPPROTO_UDP, length) + udp->source + udp->dest + udp->len;
	udp->check = checksum_of_udp(sum);

	/* verifier: two comparisons, and not the one that the compiler would make of them */
	barrier_var(size);
	if (size > MAX_RESET)
		return -1;
	barrier_var(size);
	if (size < MIN_RESET)
		return -1;
	return bpf_xdp_store_bytes(ctx, headers, work->datagram.octets, size);
}

/*
 * Turns a short header packet into the reset that its CID's server would send, and the frame into one for the client.
 * Returns the verdict: VERDICT_RESET if there is something to transmit. Options and extension headers are not answered
 * in kind. `packet` and the frame must agree: the caller has parsed it, and changed nothing.
 *
 * It calls one function after the other, for the stack: each has what the one before it had.
 */
__noinline int send_reset(struct xdp_md *ctx, struct packet *packet, struct service *service, struct reset_key *key)
{
	__u32 zero = 0, size, length;
	struct reset_work *work = bpf_map_lookup_elem(&reset_work, &zero);

	if (!packet || !service || !key || !work)
		return VERDICT_RESET_TOO_SMALL; /* verifier: for all it knows */
	size = reset_size(packet->payload_length);
	if (!size)
		return VERDICT_RESET_TOO_SMALL;
	length = load_whole_cid(ctx, packet, service, work);
	if (!length)
		return VERDICT_RESET_TOO_SMALL;
	if (!may_be_sent(service, &packet->flow.client))
		return VERDICT_RESET_LIMITED;
	if (fill_unpredictable(work, size - RESET_TOKEN) || append_token(work, size - RESET_TOKEN, key, length) ||
	    write_reset(ctx, packet, work, size))
		return VERDICT_RESET_TOO_SMALL; /* verifier: none of them fails */
	return VERDICT_RESET;
}
