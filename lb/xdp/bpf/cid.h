/*
 * Connection IDs: how to get the server ID out. The C twin of lb/cid.py, in which the reasons are; everything that
 * follows from a configuration alone is computed there, in Python, and is in struct cid_config.
 *
 * Source: draft-ietf-quic-load-balancers, the editors' copy after -21; section numbers are its own.
 */
#pragma once
#include "aes128.h"
#include "maps.h"

/* Octets as they lie in memory, the first one in the least significant bits. */
struct octets {
	__u64 low;
	__u64 high;
};

static __always_inline struct octets masked(struct octets octets, const __u64 mask[2])
{
	return (struct octets){ octets.low & mask[0], octets.high & mask[1] };
}

/* One block under a configuration's key. Global functions: the stack that AES takes is free again behind them. */
__noinline int encrypt_block(const struct cid_config *config, struct block *block)
{
	if (!config || !block)
		return 0; /* verifier: for all it knows */
	if (settings.constant_time)
		aes128_encrypt_sliced(config->sliced_key, block);
	else
		aes128_encrypt(config->encrypt_key, block);
	return 0;
}

__noinline int decrypt_block(const struct cid_config *config, struct block *block)
{
	if (!config || !block)
		return 0; /* verifier: for all it knows */
	if (settings.constant_time)
		aes128_decrypt_sliced(config->sliced_key, block);
	else
		aes128_decrypt(config->decrypt_key, block);
	return 0;
}

/* Section 5.5.1: the routing block is one block of AES. */
static __always_inline struct octets single_pass_decrypt(const struct cid_config *config, struct octets octets)
{
	struct block block = { { octets.low, octets.low >> 32, octets.high, octets.high >> 32 } };

	decrypt_block(config, &block);
	return (struct octets){
		.low = block.words[0] | (__u64)block.words[1] << 32,
		.high = block.words[2] | (__u64)block.words[3] << 32,
	};
}

/* truncate(AES(expand(length, pass, half))) of section 5.4.2, not yet cut to the bits of a half. */
static __always_inline struct octets feistel_round(const struct cid_config *config, struct octets half, __u32 pass)
{
	/* A half has 10 octets at most; octet 14 is the length, 15 the pass. */
	struct block block = { { half.low, half.low >> 32, half.high, config->block_length << 16 | pass << 24 } };

	encrypt_block(config, &block);
	return (struct octets){ block.words[0] | (__u64)block.words[1] << 32, block.words[2] };
}

/*
 * Section 5.5.2, from the last pass to the first. Each adds a function of `source` to `target`, which is the source of
 * the next. The first pass restores the right half, and is left out where the server ID does not reach into it. `tail`
 * has the octets behind the first 16.
 */
static __always_inline struct octets four_pass_decrypt(const struct cid_config *config, struct octets block, __u64 tail)
{
	__u32 shift = 8 * (config->right_at & 7); /* may be 0, and 64 - 0 is too far for a shift: 1 and then 63 - 0 */
	struct octets target = masked(block, config->left_mask), source;

	if (config->right_at & 8) {
		block = (struct octets){ block.high, tail };
		tail = 0;
	}
	source.low = block.low >> shift | block.high << 1 << (63 - shift);
	source.high = block.high >> shift | tail << 1 << (63 - shift);
	source = masked(source, config->right_mask);

#pragma nounroll
	for (__u32 pass = 4; pass >= 1; pass--) {
		struct octets change = feistel_round(config, source, pass);

		barrier_var(config); /* verifier: masks that are read again are not kept on the stack */
		change = masked(change, pass & 1 ? config->right_mask : config->left_mask);
		change.low ^= target.low;
		change.high ^= target.high;
		target = source;
		source = change;
		if (pass == 2 && !config->needs_last_pass)
			return source;
	}

	/* The target is the left half now, the source the right one. */
	shift = 8 * (config->right_at & 7);
	block.low = source.low << shift;
	block.high = source.high << shift | source.low >> 1 >> (63 - shift);
	if (config->right_at & 8)
		block = (struct octets){ 0, block.low };
	return (struct octets){ target.low | block.low, target.high | block.high };
}

/*
 * The server ID of a CID, into `key`. The CID's octets are the words' in order of memory; those behind
 * config->block_end may be anything.
 */
static __always_inline void cid_server_id(const struct cid_config *config, __u64 octets_0, __u64 octets_8,
					  __u32 octets_16, struct server_key *key)
{
	/* The routing block begins behind the first octet. */
	struct octets block = { octets_0 >> 8 | octets_8 << 56, octets_8 >> 8 | (__u64)octets_16 << 56 };
	struct octets server_id = block;

	if (config->algorithm == ALGORITHM_SINGLE_PASS)
		server_id = single_pass_decrypt(config, block);
	else if (config->algorithm == ALGORITHM_FOUR_PASS)
		server_id = four_pass_decrypt(config, block, octets_16 >> 8);
	server_id = masked(server_id, config->server_id_mask);
	__builtin_memcpy(key->server_id, &server_id, sizeof(key->server_id));
}
