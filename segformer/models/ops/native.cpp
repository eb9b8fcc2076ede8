// Cross entropy of bilinearly enlarged logits and its gradient, pixel by pixel, in float32 on a CPU; native.py compiles,
// loads and calls it. What torch runs as fifteen passes over a tile are three here, over the classes of one pixel.
//
// Work is cut into tasks by the shapes alone, and what tasks share is added in their order: the result does not
// depend on the number of threads, nor that of an image on the rest of the batch.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int LANES = 16;        // classes that are computed at once: one register of AVX-512, two of AVX2
constexpr int BAND = 16;         // rows of logits of a task
constexpr float LEAST = -64.0f;  // e^x below it changes no sum, and may be a number that CPUs are slow with

typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));

inline Lanes load(const float* from) {
    Lanes value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

inline void store(float* to, Lanes value) { std::memcpy(to, &value, sizeof value); }

// e^x for x <= 0 to 1 unit in the last place; below LEAST that of LEAST. NaN stays NaN.
inline Lanes exponential(Lanes x) {
    x = x < LEAST ? Lanes{} + LEAST : x;
    const Lanes shifted = x * 1.44269504f + 12582912.0f;  // rounds to the next integer, in the low bits
    const Lanes n = shifted - 12582912.0f;
    const Lanes r = n * 1.42860677e-6f + (n * -0.693148613f + x);  // x - n ln 2, ln 2 in two parts
    Lanes p = r * (1.0f / 5040) + 1.0f / 720;                        // Taylor's series
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return (Lanes)((Bits)p + ((Bits)shifted << 23));  // times 2^n; the bits of the constant are shifted out
}

// One side of a bilinear enlargement, align_corners=False: pixel -> its first source and the share of the second.
struct Taps {
    std::vector<int64_t> first;
    std::vector<float> share;
    Taps(int64_t source, int64_t target) : first(target), share(target) {
        const double scale = static_cast<double>(source) / target;
        for (int64_t pixel = 0; pixel < target; ++pixel) {
            const double center = std::clamp((pixel + 0.5) * scale - 0.5, 0.0, source - 1.0);
            first[pixel] = std::min(static_cast<int64_t>(center), std::max<int64_t>(source - 2, 0));
            share[pixel] = static_cast<float>(center - first[pixel]);
        }
    }
};

// Memory of a number of vectors, all `value`.
struct Vectors {
    std::vector<float> memory;
    explicit Vectors(int64_t count, float value = 0.0f) : memory(count * LANES, value) {}
    float* operator[](int64_t index) { return memory.data() + index * LANES; }
    const float* operator[](int64_t index) const { return memory.data() + index * LANES; }
};

// The vector's values combined, halves with halves.
template <typename Combine>
inline float reduce(Lanes value, Combine combine) {
    float values[LANES];
    store(values, value);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) values[i] = combine(values[i], values[i + half]);
    return values[0];
}

inline float largest(Lanes value) {
    return reduce(value, [](float a, float b) { return a > b ? a : b; });
}

inline float sum_of(Lanes value) {
    return reduce(value, [](float a, float b) { return a + b; });
}

struct Problem {
    float *losses, *grad;  // grad is null where it isn't asked for
    const float* logits;
    const int64_t* target;
    const float *pixel_weights, *class_weights;  // or null
    float smoothing, spread_sum;
    int64_t ignored, classes, height, width, full_height, full_width;
    int64_t blocks;   // vectors of a pixel
    Vectors spread;   // smoothing / K times the weights of the classes
    Taps vertical, horizontal;
};

struct PixelLoss {
    float weighted, nll, scale, own;  // the gradient is scale e - weight spread - own at the label
};

// Loss of the enlarged logits z of one pixel, of which `most` holds the largest; they become e = e^(z - max).
inline PixelLoss pixel_loss(const Problem& problem, Vectors& z, Lanes most, int64_t label, float weight) {
    const float top = largest(most), at_label = z[0][label];
    Lanes sum = {}, spread_logits = {};
    for (int64_t i = 0; i < problem.blocks; ++i) {
        const Lanes value = load(z[i]);
        if (problem.smoothing > 0) spread_logits += value * load(problem.spread[i]);
        const Lanes power = exponential(value - top);
        sum += power;
        store(z[i], power);
    }
    const float total = sum_of(sum), logarithm = std::log(total), nll = logarithm + (top - at_label);
    const float own = (1 - problem.smoothing) * weight * (problem.class_weights ? problem.class_weights[label] : 1.0f);
    float weighted = own * nll;
    if (problem.smoothing > 0) weighted += weight * (problem.spread_sum * (logarithm + top) - sum_of(spread_logits));
    return {weighted, nll, (own + problem.spread_sum * weight) / total, own};
}

// Losses of row y, whose enlarged rows are `line` (w); adds to grad_line (w). Returns the weighted sum.
double row_loss(const Problem& problem, int64_t image, int64_t y, const Vectors& line, Vectors& grad_line, Vectors& z) {
    const int64_t blocks = problem.blocks;
    double sum = 0.0;
    for (int64_t x = 0; x < problem.full_width; ++x) {
        const int64_t pixel = (image * problem.full_height + y) * problem.full_width + x;
        const int64_t label = problem.target[pixel];
        if (label == problem.ignored) {
            problem.losses[pixel] = 0.0f;
            continue;
        }
        const int64_t left = problem.horizontal.first[x] * blocks;
        const int64_t right = std::min(problem.horizontal.first[x] + 1, problem.width - 1) * blocks;
        const float second = problem.horizontal.share[x], first = 1 - second;
        Lanes most = Lanes{} - INFINITY;
        for (int64_t i = 0; i < blocks; ++i) {
            const Lanes value = load(line[left + i]) * first + load(line[right + i]) * second;
            most = value > most ? value : most;
            store(z[i], value);
        }
        const float weight = problem.pixel_weights ? problem.pixel_weights[pixel] : 1.0f;
        const PixelLoss found = pixel_loss(problem, z, most, label, weight);
        sum += found.weighted;
        problem.losses[pixel] = found.nll;
        if (!problem.grad) continue;
        for (int64_t i = 0; i < blocks; ++i) {
            Lanes value = load(z[i]) * found.scale;
            if (problem.smoothing > 0) value -= load(problem.spread[i]) * weight;
            store(grad_line[left + i], load(grad_line[left + i]) + value * first);
            store(grad_line[right + i], load(grad_line[right + i]) + value * second);
        }
        grad_line[left][label] -= found.own * first;
        grad_line[right][label] -= found.own * second;
    }
    return sum;
}

// The pixels whose first source row is one of top to bottom (not included): losses, and the gradient of those rows of
// logits; what the row below them gets goes to `edge` (w, K). Returns the weighted sum.
double band_loss(const Problem& problem, int64_t image, int64_t top, int64_t bottom, float* edge) {
    const int64_t blocks = problem.blocks, line_blocks = problem.width * blocks;
    const int64_t rows = std::min(bottom + 1, problem.height) - top, first = (image * problem.height + top) * problem.width;
    const int64_t classes = problem.classes, pixels = rows * problem.width, own = (bottom - top) * problem.width;
    Vectors small(rows * line_blocks, -1e30f), line(line_blocks), z(blocks);  // -1e30: beyond the classes
    Vectors grad_small(problem.grad ? rows * line_blocks : 0), grad_line(problem.grad ? line_blocks : 0);
    for (int64_t pixel = 0; pixel < pixels; ++pixel)
        std::memcpy(small[pixel * blocks], problem.logits + (first + pixel) * classes, 4 * classes);
    const std::vector<int64_t>& sources = problem.vertical.first;
    const std::vector<float>& shares = problem.vertical.share;
    const int64_t begin = std::lower_bound(sources.begin(), sources.end(), top) - sources.begin();
    const int64_t end = std::lower_bound(sources.begin(), sources.end(), bottom) - sources.begin();
    double sum = 0.0;
    for (int64_t y = begin; y < end; ++y) {
        const int64_t row = (sources[y] - top) * line_blocks;
        const int64_t next = (std::min(sources[y] + 1, problem.height - 1) - top) * line_blocks;
        const float low = shares[y], high = 1 - low;
        for (int64_t i = 0; i < line_blocks; ++i)
            store(line[i], load(small[row + i]) * high + load(small[next + i]) * low);
        std::fill(grad_line.memory.begin(), grad_line.memory.end(), 0.0f);
        sum += row_loss(problem, image, y, line, grad_line, z);
        for (int64_t i = 0; problem.grad && i < line_blocks; ++i) {
            const Lanes value = load(grad_line[i]);
            store(grad_small[row + i], load(grad_small[row + i]) + value * high);
            store(grad_small[next + i], load(grad_small[next + i]) + value * low);
        }
    }
    for (int64_t pixel = 0; problem.grad && pixel < pixels; ++pixel) {
        float* to = pixel < own ? problem.grad + (first + pixel) * classes : edge + (pixel - own) * classes;
        std::memcpy(to, grad_small[pixel * blocks], 4 * classes);
    }
    return sum;
}

}  // namespace

// logits (B, h, w, K), target (B, H, W) with `ignored` where a pixel doesn't count, pixel_weights (B, H, W) or null,
// class_weights (K) or null -> losses (B, H, W) = -log p, grad (B, h, w, K) or null, the weighted sum of the losses.
// Returns 1, and no results, where a label is neither `ignored` nor a class.
extern "C" int cross_entropy(double* total, float* losses, float* grad, const float* logits, const int64_t* target,
                             const float* pixel_weights, const float* class_weights, float smoothing, int64_t ignored,
                             int64_t batch, int64_t classes, int64_t height, int64_t width, int64_t full_height,
                             int64_t full_width, int threads) {
    bool unknown = false;
    for (int64_t i = 0; i < batch * full_height * full_width; ++i)
        unknown |= target[i] != ignored && (target[i] < 0 || target[i] >= classes);
    if (unknown) return 1;
    const int64_t blocks = (classes + LANES - 1) / LANES, row_size = width * classes;
    Problem problem{losses,     grad,      logits,  target,  pixel_weights, class_weights,
                    smoothing,  0.0f,      ignored, classes, height,        width,
                    full_height, full_width, blocks, Vectors(blocks), Taps(height, full_height), Taps(width, full_width)};
    for (int64_t k = 0; k < classes; ++k)
        problem.spread_sum += problem.spread[0][k] = smoothing / classes * (class_weights ? class_weights[k] : 1.0f);
    const int64_t bands = (height + BAND - 1) / BAND;
    std::vector<double> sums(batch * bands);
    std::vector<float> edges(grad ? batch * bands * row_size : 0);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t task = 0; task < batch * bands; ++task) {
        const int64_t top = task % bands * BAND, bottom = std::min(height, top + BAND);
        sums[task] = band_loss(problem, task / bands, top, bottom, edges.data() + (grad ? task * row_size : 0));
    }
    *total = 0.0;
    for (int64_t task = 0; task < batch * bands; ++task) {
        *total += sums[task];
        const int64_t row = (task % bands + 1) * BAND;
        for (int64_t i = 0; grad && row < height && i < row_size; ++i)
            grad[(task / bands * height + row) * row_size + i] += edges[task * row_size + i];
    }
    return 0;
}
