/*
 * Stateless reset tokens (RFC 9000, section 10.3): HMAC-SHA256(key, CID)[:16], as lb/reset.py makes them.
 */
#pragma once
#include "sha256.h"
#include "shared.h"

/* RFC 2104. */
#define INNER_PAD 0x36363636
#define OUTER_PAD 0x5c5c5c5c

#define CID_WORDS (MAX_CID / 4)

/* What is worked on: not on the stack, where all that leads to a reset stands already. */
struct hmac {
	struct sha256_state state;
	struct sha256_block block;
};

/* The state of SHA-256 behind one block: the key under a pad. */
static __always_inline void pad_state(const __u32 *key, __u32 pad, struct hmac *hmac, __u32 *padded)
{
	hmac->state = sha256_initial_state;
	for (int i = 0; i < 8; i++)
		hmac->block.words[i] = bpf_ntohl(key[i]) ^ pad;
	for (int i = 8; i < 16; i++)
		hmac->block.words[i] = pad;
	sha256_compress(&hmac->state, &hmac->block);
	__builtin_memcpy(padded, &hmac->state, sizeof(hmac->state));
}

/* The two states do not depend on the CID, and are kept. CPUs may do this at the same time: they write the same. */
static __always_inline void prepare_reset_key(struct reset_key *key, struct hmac *hmac)
{
	pad_state(key->key, INNER_PAD, hmac, key->inner);
	pad_state(key->key, OUTER_PAD, hmac, key->outer);
	/* A full barrier: nobody sees the flag before the states. */
	__sync_lock_test_and_set(&key->is_prepared, 1);
}

/* Word `i` of a message that is a CID: octets behind `length` give way to the bit that ends it, and zeros. */
static __always_inline __u32 message_word(const __u32 cid[CID_WORDS], __u32 length, __u32 i)
{
	__u32 word = i < CID_WORDS ? bpf_ntohl(cid[i]) : 0;
	__u32 bits = 8 * (length - 4 * i);

	if (length >= 4 * i + 4)
		return word;
	if (length < 4 * i)
		return 0;
	return (word & ~(0xffffffff >> bits)) | 0x80000000 >> bits;
}

/*
 * The token of a CID of `length` octets, 1 to MAX_CID. The octets of `cid` behind them may be anything. Words are as
 * they lie in memory, the token's too.
 */
static __always_inline void reset_token(struct reset_key *key, const __u32 cid[CID_WORDS], __u32 length,
					struct hmac *hmac, __u32 token[RESET_TOKEN / 4])
{
	struct sha256_state *state = &hmac->state;
	struct sha256_block *block = &hmac->block;

	/*
	 * No barrier here: a processor that reads the states before the flag makes a token that the client does not
	 * know. That reset is lost, and the client's next packet gets another.
	 */
	if (!*(volatile __u32 *)&key->is_prepared)
		prepare_reset_key(key, hmac);

	/* Both hashes began with one block of pad, and the lengths that end them count it. */
	__builtin_memcpy(state, key->inner, sizeof(*state));
	__builtin_memset(block, 0, sizeof(*block));
	for (__u32 i = 0; i <= CID_WORDS; i++)
		block->words[i] = message_word(cid, length, i);
	block->words[15] = 8 * (SHA256_BLOCK + length);
	sha256_compress(state, block);

	__builtin_memset(block, 0, sizeof(*block));
	__builtin_memcpy(block, state, sizeof(*state));
	block->words[8] = 0x80000000;
	block->words[15] = 8 * (SHA256_BLOCK + SHA256_DIGEST);
	__builtin_memcpy(state, key->outer, sizeof(*state));
	sha256_compress(state, block);

	for (int i = 0; i < RESET_TOKEN / 4; i++)
		token[i] = bpf_htonl(state->words[i]);
}
