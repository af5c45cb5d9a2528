// What the tests share: an assert that no build switches off, and random numbers.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>

#define CHECK(condition)                                                          \
    do {                                                                          \
        if (!(condition)) {                                                       \
            std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);  \
            std::exit(1);                                                         \
        }                                                                         \
    } while (false)

class Random {
public:
    explicit Random(unsigned seed) : engine_(seed) {}
    // From low to high, both included.
    std::int64_t between(std::int64_t low, std::int64_t high) {
        return std::uniform_int_distribution<std::int64_t>(low, high)(engine_);
    }
    std::mt19937& engine() { return engine_; }

private:
    std::mt19937 engine_;
};
