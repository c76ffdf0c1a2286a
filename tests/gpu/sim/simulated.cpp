// Runs kernels, one block after the other, with the threads of a block as fibers. The order of
// blocks, warps and lanes comes from a seed (LORA_SIM_SEED), so that a missing barrier gives a
// wrong result with some seeds.
#include "simulated.h"

#include <link.h>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include <algorithm>
#include <cstdarg>
#include <mutex>
#include <numeric>
#include <vector>

#include "fault.h"
#include "fiber.h"
#include "tensor_core.h"

#if defined(__x86_64__)
asm(R"(
.text
.hidden sim_switch
.globl sim_switch
.type sim_switch, @function
sim_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size sim_switch, .-sim_switch
)");
#endif

namespace sim {

struct Range {
    unsigned char* from;
    size_t bytes;
};

namespace {

class Random {  // splitmix64
  public:
    explicit Random(uint64_t seed) : state(seed) {}
    uint64_t next() {
        uint64_t z = (state += 0x9e3779b97f4a7c15u);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }

  private:
    uint64_t state;
};

// A permutation of 0..count-1: i -> start + i * stride (mod count), where count and stride have no
// common factor.
class Order {
  public:
    Order(Random& random, uint64_t count)
        : count(count), start(random.next() % count), stride(1 + random.next() % count) {
        while (std::gcd(stride, count) != 1) stride++;
    }
    uint64_t operator[](uint64_t i) const {
        return static_cast<uint64_t>((static_cast<unsigned __int128>(i) * stride + start) % count);
    }

  private:
    uint64_t count, start, stride;
};

// The static shared memory of all kernels that are linked with the runtime is the uninitialized
// part of this module's thread-local storage. Other thread-local variables of the module must
// therefore have an initial value that is not zero.
thread_local char anchor = 1;

Range static_shared() {
    anchor = 2;  // this access allocates the storage
    struct Search {
        uintptr_t anchor;
        Range found;
    } search{reinterpret_cast<uintptr_t>(&anchor), {nullptr, 0}};
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* data) {
            auto& search = *static_cast<Search*>(data);
            const auto from = reinterpret_cast<uintptr_t>(info->dlpi_tls_data);
            for (int i = 0; from != 0 && i < info->dlpi_phnum; i++) {
                const auto& header = info->dlpi_phdr[i];
                if (header.p_type != PT_TLS || search.anchor - from >= header.p_memsz) continue;
                search.found = {static_cast<unsigned char*>(info->dlpi_tls_data) + header.p_filesz,
                                header.p_memsz - header.p_filesz};
                return 1;
            }
            return 0;
        },
        &search);
    return search.found;
}

constexpr unsigned char POISON = 0xff;  // NaN in every float format, and an index far out of bounds
constexpr unsigned char CANARY = 0xa5;
constexpr size_t CANARY_BYTES = 128;

uint64_t seed() {
    const char* text = getenv("LORA_SIM_SEED");
    return text == nullptr ? 1 : strtoull(text, nullptr, 10);
}

}  // namespace

// ---- a block ----

struct Warp {
    Fiber* lanes[WARP] = {};
    unsigned count = 0;
};

// The state of a running block and its stacks. It is kept for the next launch.
struct Block {
    const Kernel* kernel = nullptr;
    const std::function<void()>* body = nullptr;
    dim3 index, dim, grid;
    Range static_range{nullptr, 0};
    std::vector<unsigned char> dynamic_buffer;
    unsigned char* dynamic = nullptr;
    size_t dynamic_bytes = 0;

    Context scheduler;
    const void* scheduler_stack = nullptr;  // for the address sanitizer
    size_t scheduler_stack_bytes = 0;
    Fiber* current = nullptr;
    std::vector<Fiber*> idle;  // fibers without a thread
    std::vector<Warp> warps;
    unsigned threads = 0;

    void run(Random&);

  private:
    void prepare();
    bool run_warp(Warp&, Random&);
    bool resolve(Warp&);
    unsigned release();
    void resume(Fiber&);
    void check_canary() const;
    Fiber& start(unsigned rank);
};

namespace {

Block nothing;
thread_local Block* running = &nothing;  // the block that this thread runs
Fiber gone;                              // replaces every thread that has exited

// The entry of a fiber: runs the kernel for one thread, and returns control to the scheduler for
// good.
void fiber_entry() {
    Fiber& fiber = Fiber::here();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &fiber.block->scheduler_stack,
                                    &fiber.block->scheduler_stack_bytes);
#endif
    (*fiber.block->body)();
    fiber.state = Fiber::exited;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(nullptr, fiber.block->scheduler_stack, fiber.block->scheduler_stack_bytes);
#endif
    Context::swap(fiber.context, fiber.block->scheduler);
    abort();
}

// Returns control to the scheduler until it resumes this fiber.
void pause(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, fiber.block->scheduler_stack, fiber.block->scheduler_stack_bytes);
#endif
    Context::swap(fiber.context, fiber.block->scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, &fiber.block->scheduler_stack, &fiber.block->scheduler_stack_bytes);
#endif
}

}  // namespace

Fiber& Block::start(unsigned rank) {
    if (idle.empty()) idle.push_back(Fiber::create());
    Fiber& fiber = *idle.back();
    idle.pop_back();
    fiber.begin(*this, rank, index, dim, grid, fiber_entry);
    return fiber;
}

void Block::resume(Fiber& fiber) {
    current = &fiber;
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, fiber.stack_low(),
                                   static_cast<size_t>(fiber.stack_high() - fiber.stack_low()));
#endif
    Context::swap(scheduler, fiber.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
    current = nullptr;
}

void Block::prepare() {
    if (static_range.from != nullptr) memset(static_range.from, POISON, static_range.bytes);
    memset(dynamic, POISON, dynamic_bytes);
#if defined(__SANITIZE_ADDRESS__)  // detects reads too
    ASAN_POISON_MEMORY_REGION(dynamic + dynamic_bytes, CANARY_BYTES);
#else
    memset(dynamic + dynamic_bytes, CANARY, CANARY_BYTES);
#endif
    warps.assign((threads + WARP - 1) / WARP, Warp{});
    for (unsigned w = 0; w < warps.size(); w++) warps[w].count = std::min(WARP, threads - w * WARP);
}

void Block::check_canary() const {
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(dynamic + dynamic_bytes, CANARY_BYTES);
#else
    for (size_t i = 0; i < CANARY_BYTES; i++) {
        if (dynamic[dynamic_bytes + i] != CANARY)
            fail("wrote past its %zu bytes of dynamic shared memory", dynamic_bytes);
    }
#endif
}

void Block::run(Random& random) {
    prepare();
    for (;;) {
        const Order order(random, warps.size());
        for (size_t i = 0; i < warps.size(); i++) {
            while (run_warp(warps[order[i]], random)) {
            }
        }
        if (release() == 0) break;
    }
    check_canary();
}

// Runs every ready lane until it waits or exits, in a random order. Returns whether some lanes can
// run again.
bool Block::run_warp(Warp& warp, Random& random) {
    const unsigned w = static_cast<unsigned>(&warp - warps.data());
    const uint64_t draw = random.next();
    const unsigned start_at = draw & 31, stride = ((draw >> 5) & 31) | 1;
    bool collective = false;
    for (unsigned i = 0; i < WARP; i++) {
        const unsigned lane = (start_at + i * stride) & 31;
        if (lane >= warp.count) continue;
        Fiber*& fiber = warp.lanes[lane];
        if (fiber == nullptr) fiber = &start(w * WARP + lane);
        if (fiber->state == Fiber::ready) resume(*fiber);
        if (fiber->state == Fiber::in_collective) collective = true;
        if (fiber->state == Fiber::exited && fiber != &gone) {
            idle.push_back(fiber);
            fiber = &gone;
        }
    }
    return collective && resolve(warp);
}

// Completes the collectives whose lanes have all arrived. Fails if lanes wait in collectives and
// none can complete.
bool Block::resolve(Warp& warp) {
    bool any = false;
    for (unsigned lane = 0; lane < warp.count; lane++) {
        Fiber& first = *warp.lanes[lane];
        if (first.state != Fiber::in_collective) continue;
        void* arguments[WARP] = {};
        bool complete = true;
        for (unsigned other = 0; other < warp.count; other++) {
            Fiber& fiber = *warp.lanes[other];
            if ((first.collective.mask >> other & 1) == 0 || fiber.state == Fiber::exited) continue;
            if (fiber.state != Fiber::in_collective) complete = false;
            else if (fiber.collective.operation != first.collective.operation ||
                     fiber.collective.mask != first.collective.mask) {
                current = &first;
                fail("waits in %s with mask %#x, while thread %u of its warp waits in %s with mask %#x",
                     first.collective.name, first.collective.mask, fiber.rank, fiber.collective.name,
                     fiber.collective.mask);
            } else arguments[other] = fiber.collective.argument;
        }
        if (!complete) continue;
        any = true;
        current = &first;  // the thread that the error of a failing operation names
        first.collective.operation(arguments);
        for (unsigned other = 0; other < warp.count; other++) {
            if ((first.collective.mask >> other & 1) == 0 || warp.lanes[other]->state == Fiber::exited)
                continue;
            if (other != lane) warp.lanes[other]->state = Fiber::ready;
        }
        first.state = Fiber::ready;
    }
    if (any) return true;
    for (unsigned lane = 0; lane < warp.count; lane++) {
        if (warp.lanes[lane]->state != Fiber::in_collective) continue;
        current = warp.lanes[lane];
        for (unsigned other = 0; other < warp.count; other++) {
            if ((current->collective.mask >> other & 1) != 0 &&
                warp.lanes[other]->state == Fiber::at_barrier) {
                fail(
                    "deadlock: waits in %s with mask %#x for thread %u, which waits at the __syncthreads of "
                    "line %d",
                    current->collective.name, current->collective.mask, warp.lanes[other]->rank,
                    warp.lanes[other]->line);
            }
        }
        fail("deadlock: waits in %s with mask %#x", current->collective.name, current->collective.mask);
    }
    return false;
}

// Releases the threads that wait at the barrier, and returns their number. Threads that have exited
// count as arrived.
unsigned Block::release() {
    Fiber* first = nullptr;
    unsigned released = 0;
    for (Warp& warp : warps) {
        for (unsigned lane = 0; lane < warp.count; lane++) {
            Fiber& fiber = *warp.lanes[lane];
            if (fiber.state != Fiber::at_barrier) continue;
            if (first == nullptr) first = &fiber;
            if (fiber.line != first->line) {
                current = &fiber;
                fail("waits at the __syncthreads of line %d, while thread %u waits at that of line %d",
                     fiber.line, first->rank, first->line);
            }
            fiber.state = Fiber::ready;
            released++;
        }
    }
    return released;
}

// ---- functions that kernels call ----

unsigned char* dynamic_shared() { return Fiber::here().block->dynamic; }

void sync_block(int line) {
    Fiber& fiber = Fiber::here();
    fiber.line = line;
    fiber.state = Fiber::at_barrier;
    pause(fiber);
}

void warp_collective(unsigned mask, Operation operation, void* argument, const char* name) {
    Fiber& fiber = Fiber::here();
    if ((mask >> fiber.lane & 1) == 0)
        fail("calls %s with mask %#x, which lacks its own lane %u", name, mask, fiber.lane);
    fiber.collective = {mask, operation, argument, name};
    fiber.state = Fiber::in_collective;
    pause(fiber);
}

bool is_shared(const void* address, size_t bytes) {
    const Block& block = *Fiber::here().block;
    const auto* from = static_cast<const unsigned char*>(address);
    const auto inside = [&](const unsigned char* low, size_t size) {
        return from >= low && from + bytes <= low + size;
    };
    return inside(block.dynamic, block.dynamic_bytes) ||
           inside(block.static_range.from, block.static_range.bytes);
}

void start_copy(void* shared, const void* global, bool valid) {
    if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % 16 != 0)
        fail("cp.async: an address is not a multiple of 16");
    if (!is_shared(shared, 16)) fail("cp.async: the destination is not in shared memory");
    Fiber& fiber = Fiber::here();
    memset(shared, POISON, 16);
    fiber.copies.push_back({static_cast<unsigned char*>(shared),
                            valid ? static_cast<const unsigned char*>(global) : nullptr,
                            fiber.committed_groups});
}

void commit_copies() { Fiber::here().committed_groups++; }

void wait_for_copies(unsigned pending_groups) {
    Fiber& fiber = Fiber::here();
    auto& copies = fiber.copies;
    const auto covered = [&](const AsyncCopy& copy) {
        return copy.group + pending_groups < fiber.committed_groups;
    };
    auto copy = copies.begin();
    for (; copy != copies.end() && covered(*copy); ++copy) {
        if (copy->from != nullptr) memcpy(copy->to, copy->from, 16);
        else memset(copy->to, 0, 16);
    }
    copies.erase(copies.begin(), copy);
}

bool runs_kernel() { return running->kernel != nullptr; }

void fail(const char* format, ...) {
    const Block& block = *running;
    if (block.kernel != nullptr) {
        fprintf(stderr, "simulated GPU: kernel %s, block (%u, %u, %u)", block.kernel->name, block.index.x,
                block.index.y, block.index.z);
        if (block.current != nullptr) {
            const dim3& thread = block.current->index;
            fprintf(stderr, ", thread (%u, %u, %u)", thread.x, thread.y, thread.z);
        }
        fprintf(stderr, ": ");
    } else {
        fprintf(stderr, "simulated GPU: ");
    }
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fprintf(stderr, "\n");
    abort();
}

// ---- launches ----

namespace {

// Blocks that are not running, with their stacks. They are never destroyed, because threads of
// streams may outlive main.
std::mutex spare_mutex;
std::vector<Block*>& spare_blocks = *new std::vector<Block*>;

Block* take_block() {
    const std::lock_guard lock(spare_mutex);
    if (spare_blocks.empty()) return new Block;
    Block* block = spare_blocks.back();
    spare_blocks.pop_back();
    return block;
}

void give_back(Block* block) {
    const std::lock_guard lock(spare_mutex);
    spare_blocks.push_back(block);
}

}  // namespace

std::vector<Kernel*>& kernels() {
    static auto& all = *new std::vector<Kernel*>;
    return all;
}

void register_kernel(Kernel* kernel) {
    if (const Kernel* other = find_kernel(kernel->name)) {
        fail("kernel %s is defined twice: in %s and in %s", kernel->name, other->file, kernel->file);
    }
    kernels().push_back(kernel);
}

Kernel* find_kernel(const char* name) {
    for (Kernel* kernel : kernels()) {
        if (strcmp(kernel->name, name) == 0) return kernel;
    }
    return nullptr;
}

const char* refuse(const Kernel& kernel, dim3 grid, dim3 block, size_t shared_bytes) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return "a grid without blocks";
    if (block.x == 0 || block.y == 0 || block.z == 0) return "a block without threads";
    if (grid.x > INT_MAX || grid.y > 65535 || grid.z > 65535)
        return "a grid of more than 2147483647 x 65535 x 65535 blocks";
    if (block.x > MOST_THREADS || block.y > MOST_THREADS || block.z > 64)
        return "a block of more than 1024 x 1024 x 64 threads";
    const uint64_t threads = uint64_t{block.x} * block.y * block.z;
    if (threads > MOST_THREADS) return "a block of more than 1024 threads";
    if (threads > kernel.threads) return "a block of more threads than the kernel's declaration allows";
    if (shared_bytes > kernel.dynamic_limit)
        return "more dynamic shared memory than allowed (48 KiB, unless the function's attribute was raised)";
    return nullptr;
}

void launch(const Kernel& kernel, dim3 grid, dim3 dim, size_t shared_bytes,
            const std::function<void()>& thread) {
    if (const char* reason = refuse(kernel, grid, dim, shared_bytes)) {
        fail("kernel %s, grid (%u, %u, %u), block (%u, %u, %u), %zu bytes of dynamic shared memory: %s",
             kernel.name, grid.x, grid.y, grid.z, dim.x, dim.y, dim.z, shared_bytes, reason);
    }
    catch_faults();
    if (running->kernel != nullptr) fail("launches kernel %s", kernel.name);
    Block* const block = take_block();
    block->kernel = &kernel;
    block->body = &thread;
    block->dim = dim;
    block->grid = grid;
    block->threads = dim.x * dim.y * dim.z;
    block->static_range = static_shared();
    block->dynamic_bytes = shared_bytes;
    block->dynamic_buffer.resize(shared_bytes + 2 * CANARY_BYTES);
    block->dynamic = block->dynamic_buffer.data() +
                     (-reinterpret_cast<uintptr_t>(block->dynamic_buffer.data()) & (CANARY_BYTES - 1));
    running = block;

    static const uint64_t from_environment = seed();
    Random random(from_environment);
    const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
    const Order order(random, blocks);
    for (uint64_t i = 0; i < blocks; i++) {
        const uint64_t number = order[i];
        block->index =
            dim3(static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
                 static_cast<unsigned>(number / grid.x / grid.y));
        block->run(random);
    }
    block->kernel = nullptr;
    running = &nothing;
    give_back(block);
}

void launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes, void** arguments) {
    const Kernel* kernel = find_kernel(name);
    if (kernel == nullptr) fail("kernel %s does not exist", name);
    launch(*kernel, grid, block, shared_bytes, kernel->bind(kernel->function, arguments));
}

}  // namespace sim
