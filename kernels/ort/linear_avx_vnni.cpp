// x86 with AVX2, FMA and AVX-VNNI: 16 registers of 8 lanes.
#define VLRT_LEVEL kAvxVnni
#define VLRT_NAME "avx_vnni"
#define VLRT_LANES 8
#include "linear.inc"
