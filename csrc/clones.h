// One build serves every x86-64: a function marked CJEPA_CLONES uses wider vectors, popcnt and bmi if the CPU has them.
#pragma once

#if !defined(CJEPA_CLONES)
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define CJEPA_CLONES __attribute__((flatten, target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CJEPA_CLONES
#endif
#endif
