// x86 with AVX-512 VNNI and AMX's int8 tiles, which take over where rows are many.
#define VLRT_LEVEL kAmxInt8
#define VLRT_NAME "amx_int8"
#define VLRT_LANES 16
#define VLRT_AMX
#include "linear.inc"
