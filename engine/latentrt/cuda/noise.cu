// Noise as torch.randn makes it on CUDA (TorchCudaNoise of sampling/noise.py). Compiled in front of advance.cu.

// Philox4x32 with ten rounds (Salmon et al. 2011).
__device__ inline void philox(unsigned (&c)[4], unsigned long long key) {
    unsigned key0 = (unsigned)key, key1 = (unsigned)(key >> 32);
    for (int round = 0; round < 10; ++round) {
        const unsigned long long left = 0xD2511F53ull * c[0], right = 0xCD9E8D57ull * c[2];
        c[0] = (unsigned)(right >> 32) ^ c[1] ^ key0;
        c[1] = (unsigned)right;
        c[2] = (unsigned)(left >> 32) ^ c[3] ^ key1;
        c[3] = (unsigned)left;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

// Number i of a tensor. Each of torch's threads draws four normals at a time and stores them one whole grid apart;
// here each is made where it is used. The arithmetic is cuRAND's curand_normal4, with its fast sine and cosine.
__device__ inline float normal_at(unsigned i, unsigned threads, unsigned long long seed, unsigned long long draws) {
    const unsigned thread = i % threads, stored = i / threads, part = stored % 4;
    draws += stored / 4;
    unsigned words[4] = {(unsigned)draws, (unsigned)(draws >> 32), thread, 0};
    philox(words, seed);
    const bool first = part < 2;  // of the two pairs; a pair is a radius and an angle
    const float uniform = fmaf((float)(first ? words[0] : words[2]), 0x1p-32f, 0x1p-33f);
    const float angle = fmaf((float)(first ? words[1] : words[3]), 0x1.921fb6p-30f, 0x1.921fb6p-31f);
    float sine, cosine;
    __sincosf(angle, &sine, &cosine);
    return sqrtf(-2.0f * logf(uniform)) * (part % 2 ? cosine : sine);
}
