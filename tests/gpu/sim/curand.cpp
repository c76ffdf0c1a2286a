// libcurand: generators whose numbers have the right distribution, but are not cuRAND's numbers.
#include <cmath>

#include "shared.h"

namespace {

enum Status : int { SUCCESS = 0, NOT_INITIALIZED = 101, LAUNCH_FAILURE = 201 };

struct Generator {
    void* stream = nullptr;
    uint64_t seed = 0, offset = 0;
};

// A number in (0, 1] from the generator's seed and the number's index.
float uniform(uint64_t seed, uint64_t index) {
    uint64_t z = seed * 0xd1342543de82ef95u + (index + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return static_cast<float>(((z ^ (z >> 31)) >> 40) + 1) / 16777216.0f;
}

int fill(Generator* generator, float* out, size_t count, float (*number)(uint64_t seed, uint64_t index),
         float mean, float deviation) {
    if (generator == nullptr) return NOT_INITIALIZED;
    const uint64_t seed = generator->seed, first = generator->offset;
    generator->offset += count;
    if (count == 0) return SUCCESS;
    if (!lora_sim_on_device(out, count * sizeof *out)) return LAUNCH_FAILURE;
    const bool submitted = submit(generator->stream, [=] {
        for (size_t i = 0; i < count; i++) out[i] = mean + deviation * number(seed, first + i);
    });
    return submitted ? SUCCESS : LAUNCH_FAILURE;
}

}  // namespace

EXPORT int curandCreateGenerator(Generator** generator, int) {
    *generator = new Generator;
    return SUCCESS;
}

EXPORT int curandDestroyGenerator(Generator* generator) {
    if (generator == nullptr) return NOT_INITIALIZED;
    delete generator;
    return SUCCESS;
}

EXPORT int curandSetStream(Generator* generator, void* stream) {
    if (generator == nullptr) return NOT_INITIALIZED;
    generator->stream = stream;
    return SUCCESS;
}

EXPORT int curandSetPseudoRandomGeneratorSeed(Generator* generator, unsigned long long seed) {
    if (generator == nullptr) return NOT_INITIALIZED;
    *generator = {generator->stream, seed, 0};
    return SUCCESS;
}

EXPORT int curandSetGeneratorOffset(Generator* generator, unsigned long long offset) {
    if (generator == nullptr) return NOT_INITIALIZED;
    generator->offset = offset;
    return SUCCESS;
}

EXPORT int curandGetVersion(int* version) {
    *version = 10400;
    return SUCCESS;
}

EXPORT int curandGenerateUniform(Generator* generator, float* out, size_t count) {
    return fill(generator, out, count, uniform, 0.0f, 1.0f);
}

EXPORT int curandGenerateNormal(Generator* generator, float* out, size_t count, float mean, float deviation) {
    const auto normal = [](uint64_t seed, uint64_t index) {
        return sqrtf(-2.0f * logf(uniform(seed, 2 * index))) *
               cosf(6.2831853f * uniform(~seed, 2 * index + 1));
    };
    return fill(generator, out, count, normal, mean, deviation);
}
