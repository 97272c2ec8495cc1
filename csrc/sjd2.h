/* The decoding ops of sjd2_engine as a plain C library (C99): several tokens per forward pass of any model.
 *
 * One step of a decoder, around the caller's model:
 *
 *     sjd2_embed_window   drafts          -> model inputs [B, W, D]
 *     (the model)         inputs          -> logits [B, W, V]
 *     sjd2_sample_window  logits          -> a token for every slot, its distribution p
 *     sjd2_verify         tokens, drafts  -> the decided tokens, how many of them enter the picture
 *     sjd2_commit         decided tokens  -> tokens, lengths, cache lengths, done flags
 *     sjd2_refine         decided tokens  -> the next drafts, in place
 *
 * Names: B pictures, W slots of a window (slot 0 = the last accepted token, slot j+1 = draft j), V image ids, D
 * dimensions, N positions of a picture, P >= N + W positions with padding. `p` is the target distribution, `q` the
 * one a draft was drawn from. `lengths` counts accepted tokens: slot i predicts position lengths + i, and draft j
 * sits at position lengths + j. `forced` [P] is -1 for image tokens, a structure token's id, or 0 for padding.
 *
 * Arrays are dense, row-major, in host memory. They may be misaligned to vectors, but not to their own elements.
 * Every function takes one struct whose first field holds its size in bytes (so that later versions may append
 * fields), checks sizes, pointers and every index in its arrays before it writes anything, and returns a status.
 * Nothing is allocated: where an op needs scratch memory, a query says how much. Nothing is kept between calls, so
 * every function may be called from any number of threads on different outputs. `threads` bounds the threads that
 * one call uses (0 and 1: the calling one alone); it never changes a result, nor does the processor.
 *
 * A random draw is a function of (seed of the picture, position, iteration, purpose, token id or dimension) alone,
 * by Philox4x32-10. All fields have 8 bytes, on every platform that is served.
 */
#ifndef SJD2_H
#define SJD2_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define SJD2_API __declspec(dllexport)
#else
#define SJD2_API __attribute__((visibility("default")))
#endif

#define SJD2_VERSION 10000 /* major * 10000 + minor * 100 + patch */

typedef enum sjd2_status {
    SJD2_OK = 0,
    SJD2_ERROR_STRUCT = 1,    /* `size` is not the size of a struct that this library knows */
    SJD2_ERROR_NULL = 2,      /* a pointer that is needed is null */
    SJD2_ERROR_SIZE = 3,      /* a size is negative, too large, or does not go with the others */
    SJD2_ERROR_VALUE = 4,     /* a parameter is out of its range, or an enumeration has no such value */
    SJD2_ERROR_INDEX = 5,     /* a token, level, length or count in an array is out of its range */
    SJD2_ERROR_WORKSPACE = 6  /* the workspace is smaller than the query says */
} sjd2_status;

/* Types of logits and embeddings. */
enum { SJD2_FLOAT32 = 0, SJD2_FLOAT16 = 1, SJD2_BFLOAT16 = 2 };

/* How drafts are verified. */
enum {
    SJD2_MATCH = 0,   /* a clean draft passes when it equals the new draw */
    SJD2_RATIO = 1,   /* u q(x) < p(x); behind the first rejection every draft is drawn anew from p */
    SJD2_COUPLED = 2, /* as RATIO, but every draft with a q passes the same test: kept, else the residual */
    SJD2_PAPER = 3    /* SJD2 as published: noisy drafts may pass, likely ones are kept; not exact */
};

/* What is known about a draft. */
enum {
    SJD2_FRESH = 0,   /* nothing: it cannot be tested */
    SJD2_TRACKED = 1, /* drawn from q */
    SJD2_SETTLED = 2  /* accepted while noisy; only its clean key/value is missing (PAPER) */
};

/* What a random number is for. Purposes never share a draw. */
enum { SJD2_SAMPLE = 0, SJD2_ACCEPT = 1, SJD2_RESIDUAL = 2, SJD2_NOISE = 3, SJD2_INIT = 4 };

/* Distributions of sjd2_random. */
enum { SJD2_UNIFORM = 0, SJD2_GUMBEL = 1, SJD2_NORMAL = 2 };

SJD2_API int64_t sjd2_version(void);
SJD2_API const char *sjd2_status_string(int64_t status);
/* The instruction set that the library has chosen for this processor: "avx512", "avx2" or "baseline". */
SJD2_API const char *sjd2_instruction_set(void);

/* Random numbers out [batch, length, count]: first drafts (SJD2_INIT), noise tables, first noise. */
typedef struct sjd2_random_params {
    size_t size;
    int64_t batch, length, count;
    int64_t distribution;     /* SJD2_UNIFORM in [0, 1), SJD2_GUMBEL, SJD2_NORMAL */
    int64_t iteration;        /* 0: keyed by position alone */
    int64_t purpose;          /* the windows' own normals are SJD2_NOISE */
    int64_t threads;
    const int64_t *seeds;     /* [batch] */
    const int64_t *positions; /* [batch, length] */
    float *out;
} sjd2_random_params;
SJD2_API int64_t sjd2_random(const sjd2_random_params *params);

/* Model inputs: rows of `table`, or std * noisy + mean where a draft is noisy. */
typedef struct sjd2_embed_window_params {
    size_t size;
    int64_t batch, window, dim;
    int64_t rows;          /* rows of the table: image ids, then structure ids */
    int64_t type;          /* of table, start and out */
    int64_t threads;
    const int64_t *tokens; /* [batch, window]; negative in slot 0: take `start` */
    const int32_t *levels; /* [batch, window]; -1 = clean (read only where there is `noisy`) */
    const void *table;     /* [rows, dim] */
    const void *start;     /* [batch, dim] */
    const float *noisy;    /* [batch, window - 1, dim] in the normalised space, or null */
    const float *mean;     /* [dim], with `noisy` */
    const float *std;      /* [dim], with `noisy` */
    void *out;             /* [batch, window, dim] */
} sjd2_embed_window_params;
SJD2_API int64_t sjd2_embed_window(const sjd2_embed_window_params *params);

/* Noise embeddings to the level of each position: e = (x - mean) / std, then (1 - t) e + t noise. */
typedef struct sjd2_perturb_params {
    size_t size;
    int64_t batch, length, dim;
    int64_t type;             /* of x, and of out with `denormalize` */
    int64_t level_count;      /* entries of `times` */
    int64_t epoch;            /* the iteration that keys the noise */
    int64_t denormalize;      /* 1: out is in model space in x's type, else f32 in the normalised space */
    int64_t threads;
    const void *x;            /* [batch, length, dim] */
    const int32_t *levels;    /* [batch, length]; -1 = left clean */
    const int64_t *positions; /* [batch, length] */
    const int64_t *seeds;     /* [batch] */
    const float *mean;        /* [dim] */
    const float *std;         /* [dim] */
    const float *times;       /* [level_count] */
    void *out;                /* [batch, length, dim] */
} sjd2_perturb_params;
SJD2_API int64_t sjd2_perturb(const sjd2_perturb_params *params);

/* Draw a token for every slot from p = softmax of the guided, masked, truncated logits. */
typedef struct sjd2_sample_window_params {
    size_t size;
    int64_t batch, window, vocab;
    int64_t type;          /* of the logits */
    int64_t padded;        /* P, with `noise` */
    int64_t top_k;         /* <= 0: off. Ties with the k-th logit stay */
    int64_t legal_begin;   /* only ids in [legal_begin, legal_end) can be drawn */
    int64_t legal_end;
    int64_t per_position;  /* 1: the noise is keyed by position alone, else by steps + 1 too */
    int64_t threads;
    double guidance;       /* with `uncond`: l_uncond + guidance (l_cond - l_uncond) */
    double temperature;    /* 0: the largest logit */
    double top_p;          /* (0, 1]; 1: off */
    const void *logits;    /* [batch, window, vocab] */
    const void *uncond;    /* [batch, window, vocab], or null: no guidance */
    const int64_t *seeds;  /* [batch] */
    const int32_t *lengths;/* [batch] */
    const int32_t *steps;  /* [batch] */
    const float *noise;    /* [batch, padded, vocab]: position-keyed Gumbel noise, where it is at hand, or null */
    int64_t *tokens;       /* out [batch, window] */
    float *p;              /* out [batch, window, vocab], or null */
    uint8_t *bad;          /* out [batch, window]: 1 = NaN, +infinity or no finite logit among the legal ones */
    void *workspace;       /* aligned to 64 bytes */
    int64_t workspace_size;/* in bytes */
} sjd2_sample_window_params;
SJD2_API int64_t sjd2_sample_window(const sjd2_sample_window_params *params);
/* Bytes that sjd2_sample_window needs for this vocabulary and number of threads; -1 for sizes it cannot serve. */
SJD2_API int64_t sjd2_sample_window_workspace(int64_t vocab, int64_t threads);

/* Scan the drafts and decide the token of every slot's position. */
typedef struct sjd2_verify_params {
    size_t size;
    int64_t batch, window;
    int64_t vocab;          /* of p and q; they may be null for SJD2_MATCH */
    int64_t padded, total;  /* P, N */
    int64_t rule;
    int64_t threads;
    const int64_t *tokens;  /* [batch, window], drawn from p */
    const float *p;         /* [batch, window, vocab] */
    const uint8_t *bad;     /* [batch, window] */
    const int64_t *drafts;  /* [batch, window - 1] */
    const float *q;         /* [batch, window - 1, vocab] */
    const int32_t *status;  /* [batch, window - 1] */
    const int32_t *levels;  /* [batch, window - 1] */
    const int64_t *forced;  /* [padded] */
    const int32_t *lengths; /* [batch] */
    const int32_t *steps;   /* [batch] */
    const int32_t *done;    /* [batch] */
    const int64_t *seeds;   /* [batch] */
    int64_t *decided;       /* out [batch, window]: the tokens of positions lengths, lengths + 1, ... */
    int32_t *accepted;      /* out [batch]: how many of them enter the picture now */
    int32_t *settled;       /* out [batch]: how many of them are final (more than accepted only for PAPER) */
    int32_t *fault;         /* out [batch]: the first position with bad logits, else -1 */
} sjd2_verify_params;
SJD2_API int64_t sjd2_verify(const sjd2_verify_params *params);

/* Write the accepted tokens and move every counter of the rows still at work, in place. */
typedef struct sjd2_commit_params {
    size_t size;
    int64_t batch, window, padded, total;
    int64_t kv_rows;         /* entries of kv_lengths: a multiple of batch, or 0 */
    const int64_t *decided;  /* [batch, window] */
    const int32_t *accepted; /* [batch] */
    const int32_t *fault;    /* [batch] */
    int64_t *tokens;         /* [batch, padded] */
    int32_t *lengths;        /* [batch] */
    int32_t *steps;          /* [batch]: forward passes */
    int32_t *done;           /* [batch]: 0 or 1 */
    int32_t *failed;         /* [batch]: position, -1 = fine */
    int32_t *failed_step;    /* [batch] */
    int64_t *histogram;      /* [batch, window + 1]: steps by accepted tokens */
    int32_t *kv_lengths;     /* [kv_rows]: conditional rows first; moving them is the rollback */
} sjd2_commit_params;
SJD2_API int64_t sjd2_commit(const sjd2_commit_params *params);

/* Shift the drafts by `accepted`, take the predictions over, denoise by one level, refill: all in place.
 * e <- r e + (1 - r) e0, where e0 is the normalised row of the token predicted for the same position and r =
 * ratios[level]; from level 0 a draft gets clean. New positions take `fresh_level` and normal noise. */
typedef struct sjd2_refine_params {
    size_t size;
    int64_t batch, window, padded;
    int64_t vocab;             /* of p and q, and rows of `directions`; p and q null: drafts keep no q */
    int64_t dim;               /* with `noisy` */
    int64_t rows, type;        /* of the table, with `noisy` */
    int64_t level_count;       /* entries of `ratios`, with `noisy` */
    int64_t fresh_level;
    int64_t threads;
    const int64_t *decided;    /* [batch, window], as from sjd2_verify */
    const float *p;            /* [batch, window, vocab] */
    const int32_t *accepted;   /* [batch] */
    const int32_t *settled;    /* [batch] */
    const int32_t *lengths;    /* [batch], already moved by sjd2_commit */
    const int64_t *forced;     /* [padded] */
    const int64_t *initial;    /* [batch, padded]: drafts of positions without a prediction */
    int64_t *drafts;           /* [batch, window - 1] */
    int32_t *status;           /* [batch, window - 1] */
    int32_t *levels;           /* [batch, window - 1] */
    float *q;                  /* [batch, window - 1, vocab] */
    float *noisy;              /* [batch, window - 1, dim], or null where no draft is ever noisy */
    const void *table;         /* [rows, dim] */
    const float *mean;         /* [dim] */
    const float *std;          /* [dim] */
    const float *ratios;       /* [level_count] */
    const float *noise;        /* [batch, padded, dim]: the normals of epoch 0, where at hand, or null */
    const float *directions;   /* [vocab, dim] unit rows, or null: noisy drafts take the nearest row's token */
    const int64_t *seeds;      /* [batch] */
    void *workspace;           /* with `directions`; aligned to 64 bytes */
    int64_t workspace_size;    /* in bytes */
} sjd2_refine_params;
SJD2_API int64_t sjd2_refine(const sjd2_refine_params *params);
/* Bytes that sjd2_refine needs with `directions`; -1 for sizes it cannot serve. */
SJD2_API int64_t sjd2_refine_workspace(int64_t batch, int64_t window, int64_t vocab);

#ifdef __cplusplus
}
#endif
#endif
