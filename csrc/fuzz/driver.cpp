// Feeds a fuzz target where libFuzzer is not at hand: random inputs of a seed, or the files that are named.
//
//   ./fuzz 20000 0        (number of inputs, seed)
//   ./fuzz crash-1 crash-2

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
extern uint64_t fuzz_outcomes[7][7];

static uint64_t next(uint64_t *state) {  // splitmix64
    uint64_t z = (*state += 0x9E3779B97F4A7C15u);
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

static void run_file(const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) fprintf(stderr, "%s cannot be read\n", path), exit(2);
    std::vector<uint8_t> data;
    for (int byte; (byte = fgetc(file)) != EOF;) data.push_back((uint8_t)byte);
    fclose(file);
    LLVMFuzzerTestOneInput(data.data(), data.size());
}

int main(int count, char **arguments) {
    char *end = nullptr;
    const uint64_t inputs = count > 1 ? strtoull(arguments[1], &end, 10) : 10000;
    uint64_t state = count > 2 ? strtoull(arguments[2], nullptr, 10) : 0;
    if (end && *end) {
        for (int i = 1; i < count; ++i) run_file(arguments[i]);
        return 0;
    }
    std::vector<uint8_t> data(600);
    for (uint64_t i = 0; i < inputs; ++i) {
        for (uint8_t &byte : data) byte = (uint8_t)next(&state);
        LLVMFuzzerTestOneInput(data.data(), next(&state) % data.size());
    }
    for (const auto &row : fuzz_outcomes) {  // one line per op: calls by status
        for (const uint64_t calls : row) printf("%" PRIu64 " ", calls);
        printf("\n");
    }
    return 0;
}
