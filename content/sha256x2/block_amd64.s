#include "textflag.h"

// FIPS 180-4 with SHA-NI, as Intel's "New Instructions Supporting the Secure Hash Algorithm" has it (2013), two lanes at
// once: each instruction waits for the one before it in its own lane only, and the processor runs the other lane meanwhile.
// Only SSE encodings, which are the only ones that SHA-NI has: nothing here touches the upper halves of the YMM registers.
//
// Lane A: state ABEF X1, CDGH X2; message X3 to X6. Lane B: X9, X10; X11 to X14. Scratch: X0, which SHA256RNDS2 reads
// without being told, X7 and X15.

// FLIP reverses the bytes of words; K are the constants of rounds 4i to 4i+3.
#define FLIP 0(AX)
#define K(i) (16+16*i)(AX)

// ROUNDS is four rounds of one lane with message words M.
#define ROUNDS(i, M, ABEF, CDGH) \
	MOVO        M, X0;           \
	PADDD       K(i), X0;        \
	SHA256RNDS2 X0, ABEF, CDGH;  \
	PSHUFD      $0x0e, X0, X0;   \
	SHA256RNDS2 X0, CDGH, ABEF

// LOAD is the message's own words 4i to 4i+3, which come in big-endian order.
#define LOAD(i, P, M)     \
	MOVOU  (16*i)(P), M;  \
	PSHUFB FLIP, M

// EXPAND makes of the last 16 words, the oldest four in M0, the next four, in M0.
#define EXPAND(M0, M1, M2, M3, T) \
	SHA256MSG1 M1, M0;            \
	MOVO       M3, T;             \
	PALIGNR    $4, M2, T;         \
	PADDD      T, M0;             \
	SHA256MSG2 M3, M0

#define FIRST(i, MA, MB)       \
	LOAD(i, SI, MA);           \
	LOAD(i, DI, MB);           \
	ROUNDS(i, MA, X1, X2);     \
	ROUNDS(i, MB, X9, X10)

#define NEXT(i, A0, A1, A2, A3, B0, B1, B2, B3) \
	EXPAND(A0, A1, A2, A3, X7);  \
	EXPAND(B0, B1, B2, B3, X15); \
	ROUNDS(i, A0, X1, X2);       \
	ROUNDS(i, B0, X9, X10)

#define NEXT0(i) NEXT(i, X3, X4, X5, X6, X11, X12, X13, X14)
#define NEXT1(i) NEXT(i, X4, X5, X6, X3, X12, X13, X14, X11)
#define NEXT2(i) NEXT(i, X5, X6, X3, X4, X13, X14, X11, X12)
#define NEXT3(i) NEXT(i, X6, X3, X4, X5, X14, X11, X12, X13)

// GATHER brings eight words in order, H, into the order that SHA256RNDS2 wants.
#define GATHER(H, ABEF, CDGH, T) \
	MOVOU   (H), ABEF;           \
	MOVOU   16(H), CDGH;         \
	PSHUFD  $0xb1, ABEF, ABEF;   \
	PSHUFD  $0x1b, CDGH, CDGH;   \
	MOVO    ABEF, T;             \
	PALIGNR $8, CDGH, ABEF;      \
	PBLENDW $0xf0, T, CDGH

// SCATTER is the way back.
#define SCATTER(H, ABEF, CDGH, T) \
	PSHUFD  $0x1b, ABEF, ABEF;    \
	PSHUFD  $0xb1, CDGH, CDGH;    \
	MOVO    ABEF, T;              \
	PBLENDW $0xf0, CDGH, ABEF;    \
	PALIGNR $8, T, CDGH;          \
	MOVOU   ABEF, (H);            \
	MOVOU   CDGH, 16(H)

// func blocks2(a, b *[8]uint32, p, q *byte, n int)
TEXT ·blocks2(SB), NOSPLIT, $64-40
	MOVQ a+0(FP), R8
	MOVQ b+8(FP), R9
	MOVQ p+16(FP), SI
	MOVQ q+24(FP), DI
	MOVQ n+32(FP), CX
	LEAQ tables<>(SB), AX
	TESTQ CX, CX
	JLE  done
	GATHER(R8, X1, X2, X7)
	GATHER(R9, X9, X10, X15)

loop:
	MOVOU X1, sa-64(SP)
	MOVOU X2, sb-48(SP)
	MOVOU X9, sc-32(SP)
	MOVOU X10, sd-16(SP)

	FIRST(0, X3, X11)
	FIRST(1, X4, X12)
	FIRST(2, X5, X13)
	FIRST(3, X6, X14)
	NEXT0(4)
	NEXT1(5)
	NEXT2(6)
	NEXT3(7)
	NEXT0(8)
	NEXT1(9)
	NEXT2(10)
	NEXT3(11)
	NEXT0(12)
	NEXT1(13)
	NEXT2(14)
	NEXT3(15)

	MOVOU sa-64(SP), X7
	PADDD X7, X1
	MOVOU sb-48(SP), X7
	PADDD X7, X2
	MOVOU sc-32(SP), X15
	PADDD X15, X9
	MOVOU sd-16(SP), X15
	PADDD X15, X10

	ADDQ $64, SI
	ADDQ $64, DI
	DECQ CX
	JNZ  loop

	SCATTER(R8, X1, X2, X7)
	SCATTER(R9, X9, X10, X15)

done:
	RET

// func cpuid(leaf uint32) (eax, ebx, ecx uint32)
TEXT ·cpuid(SB), NOSPLIT, $0-20
	MOVL leaf+0(FP), AX
	XORL CX, CX
	CPUID
	MOVL AX, eax+8(FP)
	MOVL BX, ebx+12(FP)
	MOVL CX, ecx+16(FP)
	RET

// The linker aligns it to at least 16 bytes, as operands in memory must be.
DATA tables<>+0(SB)/8, $0x0405060700010203
DATA tables<>+8(SB)/8, $0x0c0d0e0f08090a0b
DATA tables<>+16(SB)/8, $0x71374491428a2f98
DATA tables<>+24(SB)/8, $0xe9b5dba5b5c0fbcf
DATA tables<>+32(SB)/8, $0x59f111f13956c25b
DATA tables<>+40(SB)/8, $0xab1c5ed5923f82a4
DATA tables<>+48(SB)/8, $0x12835b01d807aa98
DATA tables<>+56(SB)/8, $0x550c7dc3243185be
DATA tables<>+64(SB)/8, $0x80deb1fe72be5d74
DATA tables<>+72(SB)/8, $0xc19bf1749bdc06a7
DATA tables<>+80(SB)/8, $0xefbe4786e49b69c1
DATA tables<>+88(SB)/8, $0x240ca1cc0fc19dc6
DATA tables<>+96(SB)/8, $0x4a7484aa2de92c6f
DATA tables<>+104(SB)/8, $0x76f988da5cb0a9dc
DATA tables<>+112(SB)/8, $0xa831c66d983e5152
DATA tables<>+120(SB)/8, $0xbf597fc7b00327c8
DATA tables<>+128(SB)/8, $0xd5a79147c6e00bf3
DATA tables<>+136(SB)/8, $0x1429296706ca6351
DATA tables<>+144(SB)/8, $0x2e1b213827b70a85
DATA tables<>+152(SB)/8, $0x53380d134d2c6dfc
DATA tables<>+160(SB)/8, $0x766a0abb650a7354
DATA tables<>+168(SB)/8, $0x92722c8581c2c92e
DATA tables<>+176(SB)/8, $0xa81a664ba2bfe8a1
DATA tables<>+184(SB)/8, $0xc76c51a3c24b8b70
DATA tables<>+192(SB)/8, $0xd6990624d192e819
DATA tables<>+200(SB)/8, $0x106aa070f40e3585
DATA tables<>+208(SB)/8, $0x1e376c0819a4c116
DATA tables<>+216(SB)/8, $0x34b0bcb52748774c
DATA tables<>+224(SB)/8, $0x4ed8aa4a391c0cb3
DATA tables<>+232(SB)/8, $0x682e6ff35b9cca4f
DATA tables<>+240(SB)/8, $0x78a5636f748f82ee
DATA tables<>+248(SB)/8, $0x8cc7020884c87814
DATA tables<>+256(SB)/8, $0xa4506ceb90befffa
DATA tables<>+264(SB)/8, $0xc67178f2bef9a3f7
GLOBL tables<>(SB), NOPTR+RODATA, $272
