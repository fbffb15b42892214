// x86 with AVX2 and FMA: 16 registers of 8 lanes.
#define VLRT_LEVEL kAvx2
#define VLRT_NAME "avx2"
#define VLRT_LANES 8
#define VLRT_BROADCASTS 4
#include "tile.inc"
