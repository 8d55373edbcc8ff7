// What the GPU does between two calls of the network, for all jobs in one launch: guidance, one row of every job's
// table (the equations of sampling/table.py), and the next input. `cuda/kernels.py` has the same structures.
//
// Arithmetic is float32, in the order of the numpy functions and without contraction (--fmad=false): a row has the
// same bits on the GPU and on the CPU. Only what the network reads and writes may be half. A thread takes one number
// at a time: latents are small (16 thousand numbers at 512²), so a launch costs its latency, not its loads.
//
// Nothing here waits for the host. A job's row index lives in device memory; the last block to finish a row moves it
// on, so a graph of (network, advance) pairs runs a whole picture. The tests compile this file as C++ for the CPU,
// after tests/support/gpu/host_cuda.h, which stands in for what is CUDA's own.

#ifdef __CUDACC__
// NVRTC comes without cuda_fp16.h; two instructions are all that is needed of it.
struct half { unsigned short bits; };

__device__ inline void put(half& target, float value) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(target.bits) : "f"(value));
}

__device__ inline float get(half value) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
}
#endif

__device__ inline void put(float& target, float value) { target = value; }
__device__ inline float get(float value) { return value; }

enum Flags : unsigned { PREVIEW = 1, BLEND = 2 };

// One row of a table: COLUMNS of sampling/table.py, then what inpainting blends in after the row.
struct Row {
    float timestep, c_in;
    float p, q, clip, slot;
    float a, o, b[4], c;
    float u, v;
    float known, known_noise;
};

// What the host says about a job; it may be written anew between rows, where lanes move.
struct Slot {
    unsigned long long seed;   // of the noise that is made here
    unsigned long long draws;  // how often each thread of torch's has drawn before the first noise of this job
    unsigned threads;          // as many as torch would launch for n numbers; 0: the host made the noise
    unsigned flags;
    int rows;                    // a job whose row index has reached it is idle, and its lanes are left alone
    int lane_cond, lane_uncond;  // lane_uncond is -1 where there is no guidance
    int lane_image;              // with the picture alone; -1 where it has no guidance of its own
    int guided_from, guided_to;  // rows in which guidance acts
    float scale, rescale;        // sampling/guidance.py
    float image_scale;           // likewise
    float start;                 // x is start * noise before the first row; 0: the host wrote x
};

// A job's lanes; -1 for those that it does not have.
struct Lanes {
    int of[3];
    __device__ explicit Lanes(const Slot& job) : of{job.lane_cond, job.lane_image, job.lane_uncond} {}
};

// What the device counts; the host sets it to zero when it admits a job.
struct Progress {
    int row;           // the next one
    int noises;        // rows so far that added noise
    int bad;           // how many rows had run when x was first seen not to be finite; 0: it is finite
    unsigned arrived;  // blocks that have finished the row
};

// All jobs and lanes of one latent shape of n numbers. T is half or float, as the network has it.
template <typename T>
struct State {
    T* sample;                 // (lanes, n)             the network's next input
    float* timestep;           // (lanes,)
    const T* out;              // (lanes, n)             the network's output
    float* x;                  // (slots, n)             latents
    float* memory;             // (slots, 4, n)          what the solver remembers
    float* preview;            // (slots, n)             written where PREVIEW is set
    const Row* table;          // (slots, rows_max)
    const float* noise;        // (slots, noises_max, n) a ring, read where Slot::threads is 0
    const float* mask;         // (slots, n)             1: repaint, 0: keep what is known; read where BLEND is set
    const float* known;        // (slots, n)             likewise
    const float* known_noise;  // (slots, n)             likewise
    float* deviation;          // (slots, 2)             of the conditional and of the guided output
    const Slot* slots;         // (slots,)
    Progress* progress;        // (slots,)
    float* scalars;            // (scalar_count, scalar_stride) the network's other inputs that are a number for each lane
    const float* scalar_rows;  // (slots, rows_max, scalar_count) their values by row
    const int* turn;           // (slots,)               0: the slot waits, since its next row is of the other depth; or null
    int n, rows_max, noises_max, scalar_count, scalar_stride;
};

// ---- Noise -------------------------------------------------------------------------------------------------------

// Number i of a job's noise `index`, counted from its first.
__device__ inline float job_noise(const Slot& job, int n, int index, int i) {
    const unsigned each = (n - 1) / (4 * job.threads) + 1;  // draws of a thread for one tensor
    return normal_at(i, job.threads, job.seed, job.draws + (unsigned long long)each * index);
}

template <typename T>
__device__ float noise_at(const State<T>& s, int slot, int index, int i) {
    const Slot& job = s.slots[slot];
    if (job.threads) return job_noise(job, s.n, index + (job.start != 0), i);  // the start is the first one
    return s.noise[((size_t)slot * s.noises_max + index % s.noises_max) * s.n + i];
}

// ---- The network's ends --------------------------------------------------------------------------------------------

__device__ inline bool is_guided(const Slot& job, int row) {
    return job.lane_uncond >= 0 && job.guided_from <= row && row < job.guided_to;
}

// Number i of what the network gave a lane.
template <typename T>
__device__ float lane_at(const State<T>& s, int lane, int i) {
    return get(s.out[(size_t)lane * s.n + i]);
}

// Ho and Salimans 2022; with a third lane Brooks et al. 2023.
template <typename T>
__device__ float guided_at(const State<T>& s, const Slot& job, int i) {
    const float cond = lane_at(s, job.lane_cond, i), uncond = lane_at(s, job.lane_uncond, i);
    if (job.lane_image < 0) return uncond + job.scale * (cond - uncond);
    const float image = lane_at(s, job.lane_image, i);
    return uncond + job.scale * (cond - image) + job.image_scale * (image - uncond);
}

// The network's output as the solver sees it (Guidance.combine of sampling/guidance.py).
template <typename T>
__device__ float out_at(const State<T>& s, int slot, int row, int i) {
    const Slot& job = s.slots[slot];
    if (!is_guided(job, row)) return lane_at(s, job.lane_cond, i);
    const float guided = guided_at(s, job, i);
    if (job.rescale == 0) return guided;
    const float matched = guided * (s.deviation[2 * slot] / s.deviation[2 * slot + 1]);
    return job.rescale * matched + (1 - job.rescale) * guided;
}

// Number i of the network's input for row `row` of a job whose latents are x there.
template <typename T>
__device__ void feed(const State<T>& s, int slot, int row, int i, float x) {
    const Slot& job = s.slots[slot];
    const Row& next = s.table[(size_t)slot * s.rows_max + row];
    const Lanes lanes(job);
    for (int lane : lanes.of)
        if (lane >= 0) put(s.sample[(size_t)lane * s.n + i], next.c_in * x);
}

// The network's inputs that are one number for each lane, for row `row`. One thread of a job writes them.
template <typename T>
__device__ void feed_numbers(const State<T>& s, int slot, int row) {
    if (blockIdx.x != 0 || threadIdx.x != 0) return;
    const Slot& job = s.slots[slot];
    const size_t at = (size_t)slot * s.rows_max + row;
    const Lanes lanes(job);
    for (int lane : lanes.of) {
        if (lane < 0) continue;
        s.timestep[lane] = s.table[at].timestep;
        for (int k = 0; k < s.scalar_count; ++k)
            s.scalars[k * s.scalar_stride + lane] = s.scalar_rows[at * s.scalar_count + k];
    }
}

// ---- One row -------------------------------------------------------------------------------------------------------

// Keeps what is not a number, which fminf and fmaxf would hide.
__device__ inline float clipped(float value, float most) {
    return value > most ? most : value < -most ? -most : value;
}

// x after the row. A memory of weight 0 is not read: it may never have been written.
__device__ inline float step(const Row& row, float x, float out, float* memory, size_t n, float noise) {
    float remembered = row.p != 0 ? row.p * x + row.q * out : row.q * out;
    if (row.clip != 0) remembered = clipped(remembered, row.clip);
    memory[(int)row.slot * n] = remembered;

    float result = row.a * x;
    if (row.o != 0) result += row.o * out;
    for (int k = 0; k < 4; ++k)
        if (row.b[k] != 0) result += row.b[k] * memory[k * n];
    if (row.c != 0) result += row.c * noise;
    return result;
}

// x with what is known put where nothing is to be repainted; `at` is the number's place in (slots, n).
template <typename T>
__device__ float blended(const State<T>& s, const Row& row, size_t at, float x) {
    const float known = row.known * s.known[at] + row.known_noise * s.known_noise[at];
    return s.mask[at] * x + (1 - s.mask[at]) * known;
}

// Number i of a job through row `k`. Returns the new x.
template <typename T>
__device__ float advance_at(const State<T>& s, int slot, int k, const Row& row, int i) {
    const Slot& job = s.slots[slot];
    const size_t at = (size_t)slot * s.n + i;
    const float x = s.x[at], out = out_at(s, slot, k, i);
    if (job.flags & PREVIEW) s.preview[at] = row.u * x + row.v * out;
    const float noise = row.c != 0 ? noise_at(s, slot, s.progress[slot].noises, i) : 0;
    float result = step(row, x, out, s.memory + (size_t)slot * 4 * s.n + i, s.n, noise);
    if (job.flags & BLEND) result = blended(s, row, at, result);
    s.x[at] = result;
    return result;
}

// Called by every thread once its numbers are done: the last block of the job moves it to its next row.
__device__ inline void finish_row(Progress& progress, bool noise) {
    __syncthreads();
    if (threadIdx.x != 0) return;
    __threadfence();
    if (atomicInc(&progress.arrived, gridDim.x - 1) != gridDim.x - 1) return;
    progress.row += 1;
    progress.noises += noise;
}

template <typename T>
__device__ bool waits(const State<T>& s, int slot) {
    return s.progress[slot].row >= s.slots[slot].rows || (s.turn && !s.turn[slot]);
}

template <typename T>
__device__ void advance(const State<T>& s) {
    const int slot = blockIdx.y, k = s.progress[slot].row;
    if (waits(s, slot)) return;
    const Row row = s.table[(size_t)slot * s.rows_max + k];
    if (k + 1 < s.slots[slot].rows) feed_numbers(s, slot, k + 1);
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < s.n; i += gridDim.x * blockDim.x) {
        const float x = advance_at(s, slot, k, row, i);
        if (k + 1 < s.slots[slot].rows) feed(s, slot, k + 1, i, x);
        if (!isfinite(x)) atomicCAS(&s.progress[slot].bad, 0, k + 1);
    }
    finish_row(s.progress[slot], row.c != 0);
}

// Before a job's first row, and after its lanes moved: the input of the network for its next row. grid.y jobs.
template <typename T>
__device__ void begin(const State<T>& s, int first) {
    const int slot = first + blockIdx.y, k = s.progress[slot].row;
    const Slot& job = s.slots[slot];
    if (k >= job.rows) return;
    feed_numbers(s, slot, k);
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < s.n; i += gridDim.x * blockDim.x) {
        float& x = s.x[(size_t)slot * s.n + i];
        if (k == 0 && job.start != 0) x = job.start * job_noise(job, s.n, 0, i);
        feed(s, slot, k, i, x);
    }
}

// After a full call: keeps the deep features (lanes, n) of the jobs whose turn it is, for their shallow rows. grid.y jobs.
template <typename T>
__device__ void keep(const State<T>& s, T* kept, const T* deep, int n) {
    const int slot = blockIdx.y;
    if (waits(s, slot)) return;
    const Lanes lanes(s.slots[slot]);
    for (int lane : lanes.of)
        for (int i = blockIdx.x * blockDim.x + threadIdx.x; lane >= 0 && i < n; i += gridDim.x * blockDim.x)
            kept[(size_t)lane * n + i] = deep[(size_t)lane * n + i];
}

// ---- Standard deviations, for guidance that is rescaled ------------------------------------------------------------

constexpr int THREADS = 256;

// The sum over a block of THREADS threads, the same in each, always added in the same order.
__device__ inline float block_sum(float value) {
    __shared__ float sums[THREADS];
    sums[threadIdx.x] = value;
    for (unsigned left = THREADS / 2; left > 0; left /= 2) {
        __syncthreads();
        if (threadIdx.x < left) sums[threadIdx.x] += sums[threadIdx.x + left];
    }
    __syncthreads();
    const float sum = sums[0];
    __syncthreads();  // so that the next call may write
    return sum;
}

// The sample standard deviation of at(0), at(1), ... at(n - 1), in two passes.
template <typename At>
__device__ float deviation_of(int n, const At& at) {
    float sum = 0, squares = 0;
    for (int i = threadIdx.x; i < n; i += THREADS) sum += at(i);
    const float mean = block_sum(sum) / n;
    for (int i = threadIdx.x; i < n; i += THREADS) squares += (at(i) - mean) * (at(i) - mean);
    return sqrtf(block_sum(squares) / (n - 1));
}

// One block of THREADS threads for each job.
template <typename T>
__device__ void deviations(const State<T>& s) {
    const int slot = blockIdx.y, k = s.progress[slot].row;
    const Slot& job = s.slots[slot];
    if (k >= job.rows || job.rescale == 0 || !is_guided(job, k)) return;
    const float cond = deviation_of(s.n, [&](int i) { return lane_at(s, job.lane_cond, i); });
    const float guided = deviation_of(s.n, [&](int i) { return guided_at(s, job, i); });
    if (threadIdx.x != 0) return;
    s.deviation[2 * slot] = cond;
    s.deviation[2 * slot + 1] = guided;
}

// ---- To the VAE and from it ----------------------------------------------------------------------------------------

template <typename T>
__device__ void to_latents(T* latents, const float* x, int count, float scale, float shift) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x)
        put(latents[i], x[i] / scale + shift);
}

// image (pictures, channels, area) in -1..1 to pixels (pictures, area, channels), as to_uint8 of images/pixels.py rounds;
// bad[picture] = 1 where a number is not finite. grid.y pictures.
template <typename T>
__device__ void to_pixels(unsigned char* pixels, int* bad, const T* image, int area, int channels) {
    const size_t picture = (size_t)blockIdx.y * area * channels;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < area; i += gridDim.x * blockDim.x) {
        for (int channel = 0; channel < channels; ++channel) {
            const float value = get(image[picture + (size_t)channel * area + i]);
            if (!isfinite(value)) bad[blockIdx.y] = 1;
            const float unit = fminf(fmaxf(value * 0.5f + 0.5f, 0.0f), 1.0f);
            pixels[picture + (size_t)i * channels + channel] = (unsigned char)rintf(unit * 255.0f);
        }
    }
}

// ---- What the host launches ----------------------------------------------------------------------------------------

#define KERNELS(T)                                                                                                    \
    extern "C" __global__ void advance_##T(State<T> s) { advance(s); }                                                \
    extern "C" __global__ void begin_##T(State<T> s, int first) { begin(s, first); }                                  \
    extern "C" __global__ void keep_##T(State<T> s, T* kept, const T* deep, int n) { keep(s, kept, deep, n); }        \
    extern "C" __global__ void deviations_##T(State<T> s) { deviations(s); }                                          \
    extern "C" __global__ void to_latents_##T(T* latents, const float* x, int count, float scale, float shift) {      \
        to_latents(latents, x, count, scale, shift);                                                                  \
    }                                                                                                                 \
    extern "C" __global__ void to_pixels_##T(unsigned char* pixels, int* bad, const T* image, int area, int channels) {\
        to_pixels(pixels, bad, image, area, channels);                                                                \
    }

KERNELS(half)
KERNELS(float)

// The numbers that torch.randn(count, device="cuda") makes after `draws` draws.
extern "C" __global__ void normal(
    float* numbers, int count, unsigned threads, unsigned long long seed, unsigned long long draws
) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x)
        numbers[i] = normal_at(i, threads, seed, draws);
}
