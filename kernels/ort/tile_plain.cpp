// What every processor of the platform has: SSE2 on x86, NEON on arm64, else what the compiler makes of short vectors.
#define VLRT_LEVEL kPlain
#define VLRT_LANES 4
#if defined(__aarch64__)
#define VLRT_NAME "neon"
#define VLRT_BROADCASTS 8  // 32 registers
#else
#define VLRT_NAME "plain"
#define VLRT_BROADCASTS 4  // 16 registers
#endif
#include "tile.inc"
