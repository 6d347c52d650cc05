// Decoder layers of a step in one call, called through ctypes (decoder_layers.py). See decoder.h.

#include "decoder.h"

#if PROMPTPLEX_PRODUCTS

extern "C" {

// The layers' weights are all of one format. Overwrites `hidden [T, d]` with the output of the last of `num_layers` layers.
void promptplex_decoder_layers(const DecoderLayer* layers, int64_t num_layers, const DecoderShape* shape, float epsilon,
                               float scale, const StepGroup* groups, int64_t num_groups, uint16_t* hidden,
                               int64_t tokens, const uint16_t* cos, const uint16_t* sin, const int64_t* logit_rows,
                               int64_t num_logit_rows, int threads) {
    static thread_local DecoderMemory memory;
    const DecoderStep step{hidden, cos, sin, logit_rows, tokens, num_logit_rows};
    const auto run = [&](auto decoder) {
        decoder.divide(num_groups, threads);
#pragma omp parallel num_threads(threads)
        for (int64_t layer = 0; layer < num_layers; ++layer) decoder.run(layers[layer], layer + 1 == num_layers);
    };
#if PROMPTPLEX_INT8
    if (layers[0].qkv.channels != nullptr) return run(Decoder<Int8>(*shape, epsilon, scale, groups, step, memory));
#endif
    run(Decoder<Bf16>(*shape, epsilon, scale, groups, step, memory));
}

}  // extern "C"

#endif
