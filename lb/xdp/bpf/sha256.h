/*
 * SHA-256's compression function. Source: FIPS 180-4; section numbers are its own.
 */
#pragma once
#include "bpf.h"

#define SHA256_BLOCK 64
#define SHA256_DIGEST 32

struct sha256_state {
	__u32 words[SHA256_DIGEST / 4];
};

/* Of the message, as numbers: the first octet is the most significant one. */
struct sha256_block {
	__u32 words[SHA256_BLOCK / 4];
};

/* Section 4.2.2. Not static, nor is the next: libbpf does not place static variables in a section's BTF. */
const __u32 sha256_constants[64] = {
	0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
	0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
	0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
	0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
	0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
	0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
	0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
	0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

/* Section 5.3.3. */
const struct sha256_state sha256_initial_state = {
	{ 0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19 },
};

/*
 * A word twice. BPF has no rotation: the lower half of this, shifted to the right, is one, and for half the instructions
 * where a word is rotated more than once.
 */
static __always_inline __u64 doubled(__u32 x)
{
	__u64 upper = x;

	barrier_var(upper); /* the compiler would take it for a rotation, and that apart again */
	return upper << 32 | x;
}

/* One round (section 6.2.2, step 3): the new `a` in place of h, the new `e` in place of d. */
static __always_inline void sha256_round(__u32 a, __u32 b, __u32 c, __u32 *d, __u32 e, __u32 f, __u32 g, __u32 *h,
					 __u32 constant_and_word)
{
	__u64 aa = doubled(a), ee = doubled(e);
	__u32 sigma_1 = ee >> 6 ^ ee >> 11 ^ ee >> 25;
	__u32 sigma_0 = aa >> 2 ^ aa >> 13 ^ aa >> 22;
	__u32 choice = g ^ (e & (f ^ g));
	__u32 majority = ((a ^ b) & (b ^ c)) ^ b;
	__u32 t1 = *h + sigma_1 + choice + constant_and_word;

	*d += t1;
	*h = t1 + sigma_0 + majority;
}

/* Sixteen more words of the message schedule in place of the last sixteen (step 1). */
static __always_inline void sha256_next_words(__u32 *words)
{
#pragma unroll
	for (int i = 0; i < 16; i++) {
		__u32 x = words[(i + 1) & 15], y = words[(i + 14) & 15];
		__u64 xx = doubled(x), yy = doubled(y);
		__u32 sigma_0 = xx >> 7 ^ xx >> 18 ^ x >> 3, sigma_1 = yy >> 17 ^ yy >> 19 ^ y >> 10;

		words[i] += sigma_0 + words[(i + 9) & 15] + sigma_1;
		asm volatile("" ::: "memory"); /* verifier: no copy of all words on the stack */
	}
}

/*
 * One block into a state; the block is spent.
 *
 * verifier: a global function, because it must not return an address of the stack. A static one, whose result nobody
 * looks at, returns whatever the compiler left in the register.
 */
__noinline int sha256_compress(struct sha256_state *state, struct sha256_block *block)
{
	__u32 a, b, c, d, e, f, g, h;

	if (!state || !block)
		return 0; /* verifier: for all it knows */
	a = state->words[0];
	b = state->words[1];
	c = state->words[2];
	d = state->words[3];
	e = state->words[4];
	f = state->words[5];
	g = state->words[6];
	h = state->words[7];
#pragma nounroll
	for (int first = 0; first < 64; first += 16) {
		const __u32 *k = &sha256_constants[first];
		__u32 *w = block->words;

		if (first)
			sha256_next_words(w);
		/* After eight rounds the names are in their places again. */
#pragma unroll
		for (int i = 0; i < 16; i += 8) {
			sha256_round(a, b, c, &d, e, f, g, &h, k[i] + w[i]);
			sha256_round(h, a, b, &c, d, e, f, &g, k[i + 1] + w[i + 1]);
			sha256_round(g, h, a, &b, c, d, e, &f, k[i + 2] + w[i + 2]);
			sha256_round(f, g, h, &a, b, c, d, &e, k[i + 3] + w[i + 3]);
			sha256_round(e, f, g, &h, a, b, c, &d, k[i + 4] + w[i + 4]);
			sha256_round(d, e, f, &g, h, a, b, &c, k[i + 5] + w[i + 5]);
			sha256_round(c, d, e, &f, g, h, a, &b, k[i + 6] + w[i + 6]);
			sha256_round(b, c, d, &e, f, g, h, &a, k[i + 7] + w[i + 7]);
		}
	}
	state->words[0] += a;
	state->words[1] += b;
	state->words[2] += c;
	state->words[3] += d;
	state->words[4] += e;
	state->words[5] += f;
	state->words[6] += g;
	state->words[7] += h;
	return 0;
}
