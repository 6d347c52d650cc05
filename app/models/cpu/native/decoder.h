// Consecutive decoder layers of the Llama kind on a step's packed tokens, in one parallel region:
//
//     h += o(attention(rotary(qkv(norm(h)))));  h += down(activation(gate(norm(h))) * up(norm(h)))
//
// Each line of a layer is a phase that all threads share; a barrier ends it. Results are rounded to bf16 where the
// layers of transformers round theirs. T tokens, d hidden size, H heads, Hk kv heads, D head width, F inner width of
// the MLP, N tokens with wanted logits.

#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "attention.h"
#include "norms.h"
#include "products.h"

#if PROMPTPLEX_PRODUCTS

namespace {

// Addresses of a layer's frozen weights and of its pools; the order is that of decoder_layers.py.
struct DecoderLayer {
    Packed qkv, o, gate_up, down;
    const uint16_t *input_norm, *mlp_norm, *query_norm, *key_norm;  // the last two may be null
    uint16_t *keys, *values;                                        // [S, Hk * D]
    int64_t group;                                                  // of `groups`
};

// What layers of one KV group see of a step.
struct StepGroup {
    const int64_t *slots, *slot_begin, *token_begin;
    int64_t items, window;
    const int64_t* write_slots;  // [T]
};

struct DecoderShape {
    int64_t hidden, heads, kv_heads, width, rotary, inner, activation;

    int64_t qkv() const { return (heads + 2 * kv_heads) * width; }
    int64_t attended() const { return heads * width; }
};

struct DecoderStep {
    uint16_t* hidden;            // [T, d]: embeddings come in, the last layer's output goes out
    const uint16_t *cos, *sin;   // [T, rotary]
    const int64_t* logit_rows;   // [N]; of the last layer only these rows are wanted
    int64_t tokens, num_logit_rows;
};

constexpr int64_t kMlpRows = kTilesAtOnce * kRowsOfTile;  // whose inner activations stay in the cache

// What one step needs beside its input, kept from step to step.
struct DecoderMemory {
    std::vector<uint32_t> packed, packed_inner;
    std::vector<uint16_t> qkv, attended, inner, rows;
    std::vector<std::vector<Task>> tasks;  // of each group

    template <class T>
    static T* at_least(std::vector<T>& memory, int64_t size) {
        if (static_cast<int64_t>(memory.size()) < size) memory.resize(size);
        return memory.data();
    }
};

template <class Format>
class Decoder {
  public:
    using Rows = PackedRows<Format>;

    Decoder(const DecoderShape& shape, float epsilon, float scale, const StepGroup* groups, const DecoderStep& step,
            DecoderMemory& memory)
        : shape(shape), epsilon(epsilon), scale(scale), groups(groups), step(step), memory(memory) {
        const int64_t tokens = step.tokens;
        packed = memory.at_least(memory.packed, Rows::size(tokens, std::max(shape.hidden, shape.attended())));
        qkv = memory.at_least(memory.qkv, tokens * shape.qkv());
        attended = memory.at_least(memory.attended, tokens * shape.attended());
        const int64_t block = std::min(tokens, kMlpRows);
        inner = memory.at_least(memory.inner, block * shape.inner);
        packed_inner = memory.at_least(memory.packed_inner, Rows::size(block, std::max(shape.hidden, shape.inner)));
    }

    // How each group's attention is divided among the threads. Called once, before `run`.
    void divide(int64_t num_groups, int threads) {
        memory.tasks.clear();
        for (const StepGroup* group = groups; group < groups + num_groups; ++group) {
            memory.tasks.push_back(tasks_of(attention_of(*group, nullptr, nullptr), group->items, threads));
        }
    }

    // Called by every thread of a team.
    void run(const DecoderLayer& layer, bool is_last) {
        write_keys_and_queries(layer);
        attend(layer);
        if (is_last && step.num_logit_rows < step.tokens) return finish_wanted(layer);
        finish(layer, step.hidden, attended, step.tokens);
    }

  private:
    const DecoderShape& shape;
    const float epsilon, scale;
    const StepGroup* groups;
    const DecoderStep& step;
    DecoderMemory& memory;
    uint32_t *packed, *packed_inner;
    uint16_t *qkv, *attended, *inner;

    Attention attention_of(const StepGroup& group, const uint16_t* keys, const uint16_t* values) const {
        return {qkv, shape.qkv(), shape.width, keys, values, attended, group.slots, group.slot_begin, group.token_begin,
                shape.heads, shape.kv_heads, shape.width, shape.width, group.window, true, nullptr, 0, scale};
    }

    // out = rows times weights; every thread has its share of the outputs.
    void product(const Weights& weights, const Rows& rows, const Finish& finish) const {
        const int64_t thread = omp_get_thread_num(), all = omp_get_num_threads(), groups = weights.groups();
        multiply(weights, rows, groups * thread / all, groups * (thread + 1) / all, finish);
#pragma omp barrier
    }

    void pack(const Rows& to, const uint16_t* rows, int64_t width) const {
#pragma omp for schedule(static)
        for (int64_t tile = 0; tile < to.tiles.count; ++tile) {
            to.pack(tile, rows + to.tiles.begin(tile) * width, width, width);
        }
    }

    void pack_normalised(const Rows& to, const uint16_t* rows, const uint16_t* weight) const {
        std::vector<uint16_t> normalised(kRowsOfTile * shape.hidden);
#pragma omp for schedule(static)
        for (int64_t tile = 0; tile < to.tiles.count; ++tile) {
            for (int row = 0; row < to.tiles.size(tile); ++row) {
                const uint16_t* from = rows + (to.tiles.begin(tile) + row) * shape.hidden;
                rms_norm_row(from, weight, normalised.data() + row * shape.hidden, shape.hidden, epsilon);
            }
            to.pack(tile, normalised.data(), shape.hidden, shape.hidden);
        }
    }

    void write_keys_and_queries(const DecoderLayer& layer) const {
        const Rows rows(step.tokens, shape.hidden, packed);
        pack_normalised(rows, step.hidden, layer.input_norm);
        product({layer.qkv, shape.qkv(), shape.hidden}, rows, {qkv, shape.qkv()});
        const int64_t* write_slots = groups[layer.group].write_slots;
#pragma omp for schedule(static)
        for (int64_t token = 0; token < step.tokens; ++token) {
            uint16_t* query = qkv + token * shape.qkv();
            uint16_t* key = query + shape.attended();
            const uint16_t* value = key + shape.kv_heads * shape.width;
            for (int64_t head = 0; head < shape.heads; ++head) turn(query + head * shape.width, token, layer.query_norm);
            for (int64_t head = 0; head < shape.kv_heads; ++head) turn(key + head * shape.width, token, layer.key_norm);
            const int64_t pitch = shape.kv_heads * shape.width, to = write_slots[token] * pitch;
            std::memcpy(layer.keys + to, key, pitch * sizeof *key);
            std::memcpy(layer.values + to, value, pitch * sizeof *value);
        }
    }

    // Normalise a head, if it has a norm, and turn pairs of its numbers by the token's angles.
    void turn(uint16_t* head, int64_t token, const uint16_t* norm) const {
        if (norm != nullptr) rms_norm_row(head, norm, head, shape.width, epsilon);
        const uint16_t *cos = step.cos + token * shape.rotary, *sin = step.sin + token * shape.rotary;
        const int64_t half = shape.rotary / 2;
        for (int64_t d = 0; d < half; d += kLanes) {
            const Vector low = load_halves(head + d), high = load_halves(head + half + d);
            store_halves(head + d, low * load_halves(cos + d) - high * load_halves(sin + d));
            store_halves(head + half + d, high * load_halves(cos + half + d) + low * load_halves(sin + half + d));
        }
    }

    void attend(const DecoderLayer& layer) const {
        const Attention attention = attention_of(groups[layer.group], layer.keys, layer.values);
        const std::vector<Task>& tasks = memory.tasks[layer.group];
        Worker worker(attention);
#pragma omp for schedule(dynamic, 1)
        for (size_t task = 0; task < tasks.size(); ++task) worker.run(tasks[task]);
    }

    // What follows attention, for `count` rows.
    void finish(const DecoderLayer& layer, uint16_t* hidden, const uint16_t* attended, int64_t count) const {
        const Rows rows(count, shape.attended(), packed);
        pack(rows, attended, shape.attended());
        product({layer.o, shape.hidden, shape.attended()}, rows,
                {hidden, shape.hidden, Activation::kNone, false, hidden});
        for (int64_t first = 0; first < count; first += kMlpRows) {
            add_mlp(layer, hidden + first * shape.hidden, std::min(kMlpRows, count - first));
        }
    }

    void add_mlp(const DecoderLayer& layer, uint16_t* hidden, int64_t count) const {
        const Rows rows(count, shape.hidden, packed);
        pack_normalised(rows, hidden, layer.mlp_norm);
        product({layer.gate_up, 2 * shape.inner, shape.hidden}, rows,
                {inner, shape.inner, static_cast<Activation>(shape.activation), true});
        const Rows inner_rows(count, shape.inner, packed_inner);
        pack(inner_rows, inner, shape.inner);
        product({layer.down, shape.hidden, shape.inner}, inner_rows,
                {hidden, shape.hidden, Activation::kNone, false, hidden});
    }

    // The last layer's rows whose logits are wanted; the others come out as zeros, unread.
    void finish_wanted(const DecoderLayer& layer) const {
        const int64_t count = step.num_logit_rows;
#pragma omp single
        {
            DecoderMemory::at_least(memory.rows, count * (shape.hidden + shape.attended()));
            for (int64_t row = 0; row < count; ++row) {
                std::memcpy(wanted_hidden(row), step.hidden + step.logit_rows[row] * shape.hidden, shape.hidden * 2);
                std::memcpy(wanted_attended(row), attended + step.logit_rows[row] * shape.attended(), shape.attended() * 2);
            }
        }
        finish(layer, wanted_hidden(0), wanted_attended(0), count);
#pragma omp single
        {
            std::memset(step.hidden, 0, step.tokens * shape.hidden * 2);
            for (int64_t row = 0; row < count; ++row) {
                std::memcpy(step.hidden + step.logit_rows[row] * shape.hidden, wanted_hidden(row), shape.hidden * 2);
            }
        }
    }

    uint16_t* wanted_hidden(int64_t row) const { return memory.rows.data() + row * shape.hidden; }
    uint16_t* wanted_attended(int64_t row) const {
        return memory.rows.data() + step.num_logit_rows * shape.hidden + row * shape.attended();
    }
};

}  // namespace

#endif
