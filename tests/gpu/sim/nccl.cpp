// libnccl between processes of one machine: point-to-point transfers, all-gather and broadcast over
// loopback sockets. A group runs on the thread of its stream, so the stream continues, and its
// events complete, only when the peers have done their part.
#include <climits>
#include <cstdio>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "nccl_communicator.h"
#include "shared.h"

extern "C" int cuCtxGetDevice(int* ordinal);
extern "C" int cuLaunchHostFunc(void* stream, void (*function)(void*), void* argument);

using namespace nccl;

// The type that ncclComm_t points to.
struct ncclComm {
    std::shared_ptr<Communicator> communicator;
};

namespace {

struct UniqueId {
    char bytes[128];
};

struct Config {  // the beginning of ncclConfig_t
    size_t size;
    unsigned magic, version;
    int blocking;
};

struct Work {
    std::shared_ptr<Communicator> communicator;
    void* stream;
    std::vector<Transfer> transfers;
};

struct Group {
    int depth = 0;
    Result error = SUCCESS;
    std::vector<Work> works;                             // one for each communicator
    std::vector<std::shared_ptr<Communicator>> started;  // blocking communicators of ncclCommInitRank
};
thread_local Group group;

constexpr size_t ELEMENT_BYTES[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};

Result enqueue(Work work) {
    struct Call {
        Work work;
        uint64_t turn;
    };
    Communicator& communicator = *work.communicator;
    auto* const call = new Call{std::move(work), communicator.issue()};
    communicator.begin_operation();
    const auto run = [](void* argument) {
        auto* const call = static_cast<Call*>(argument);
        call->work.communicator->transfer(call->turn, std::move(call->work.transfers));
        delete call;
    };
    if (cuLaunchHostFunc(call->work.stream, run, call) != 0) {
        delete call;
        return INVALID_ARGUMENT;
    }
    return communicator.blocking ? SUCCESS : IN_PROGRESS;
}

int start_group() {
    group.depth++;
    return SUCCESS;
}

int end_group() {
    if (group.depth == 0) return INVALID_USAGE;
    if (--group.depth > 0) return SUCCESS;
    Group ended = std::exchange(group, {});
    Result result = ended.error;
    for (const auto& communicator : ended.started) {
        communicator->wait_until_connected();
        if (result == SUCCESS) result = communicator->state();
    }
    for (Work& work : ended.works) {
        if (result == SUCCESS || result == IN_PROGRESS) result = enqueue(std::move(work));
    }
    return result;
}

// Checks the arguments of an operation and adds its transfers to the group.
int add(ncclComm* handle, void* stream, const std::vector<Transfer>& transfers) {
    const auto check = [&]() -> Result {
        if (handle == nullptr) return INVALID_ARGUMENT;
        Communicator& communicator = *handle->communicator;
        if (!communicator.ready()) {
            fprintf(stderr,
                    "simulated NCCL: a communicator is used before ncclCommGetAsyncError reported success\n");
            return INVALID_ARGUMENT;
        }
        if (const Result state = communicator.state(); state != SUCCESS) return state;
        for (const Transfer& transfer : transfers) {
            if (transfer.peer < 0 || transfer.peer >= communicator.ranks) return INVALID_ARGUMENT;
            if (transfer.bytes > 0 && !lora_sim_on_device(transfer.data, transfer.bytes)) {
                fprintf(stderr,
                        "simulated NCCL: a buffer of %zu bytes is not in one allocation on the device\n",
                        transfer.bytes);
                return INVALID_ARGUMENT;
            }
        }
        for (Work& work : group.works) {
            if (work.communicator != handle->communicator) continue;
            if (work.stream != stream) {
                fprintf(stderr,
                        "simulated NCCL: a group with two streams of one communicator is not simulated\n");
                return INVALID_USAGE;
            }
            work.transfers.insert(work.transfers.end(), transfers.begin(), transfers.end());
            return SUCCESS;
        }
        group.works.push_back({handle->communicator, stream, transfers});
        return SUCCESS;
    };
    start_group();
    const Result result = check();
    if (result != SUCCESS) group.error = result;
    const int ended = end_group();
    return result != SUCCESS ? result : ended;
}

char* bytes_of(const void* data) { return static_cast<char*>(const_cast<void*>(data)); }

}  // namespace

// ---- communicators ----

EXPORT int ncclGetVersion(int* version) {
    *version = nccl::version();
    return SUCCESS;
}

EXPORT const char* ncclGetErrorString(int result) {
    switch (result) {
        case SUCCESS: return "no error";
        case SYSTEM_ERROR: return "unhandled system error (run with NCCL_DEBUG=INFO for details)";
        case INTERNAL_ERROR: return "internal error - please report this issue to the NCCL developers";
        case INVALID_ARGUMENT: return "invalid argument (run with NCCL_DEBUG=WARN for details)";
        case INVALID_USAGE: return "invalid usage (run with NCCL_DEBUG=WARN for details)";
        case REMOTE_ERROR: return "remote process exited or there was a network error";
        case IN_PROGRESS: return "NCCL operation in progress";
        default: return "unknown result code";
    }
}
EXPORT const char* ncclGetLastError(ncclComm*) { return ""; }

EXPORT int ncclGetUniqueId(UniqueId* unique) {
    Id id = {};
    const Result result = make_id(&id);
    *unique = {};
    memcpy(unique->bytes, &id, sizeof id);
    return result;
}

EXPORT int ncclCommInitRankConfig(ncclComm** handle, int ranks, UniqueId unique, int rank,
                                  const Config* config) {
    if (handle == nullptr || ranks < 1 || rank < 0 || rank >= ranks) return INVALID_ARGUMENT;
    if (config != nullptr && (config->magic != 0xcafebeef || config->size < sizeof(Config)))
        return INVALID_ARGUMENT;
    int device = 0;
    if (cuCtxGetDevice(&device) != 0) return 1;  // ncclUnhandledCudaError
    const bool blocking = config == nullptr || config->blocking == INT_MIN || config->blocking != 0;
    auto communicator = std::make_shared<Communicator>(rank, ranks, device, blocking);
    *handle = new ncclComm{communicator};
    Id id;
    memcpy(&id, unique.bytes, sizeof id);
    // The thread ends when the communicator is connected or aborted.
    std::thread([communicator, id] { communicator->connect(id); }).detach();
    if (!blocking) return IN_PROGRESS;
    start_group();
    group.started.push_back(communicator);
    return end_group();
}
EXPORT int ncclCommInitRank(ncclComm** handle, int ranks, UniqueId unique, int rank) {
    return ncclCommInitRankConfig(handle, ranks, unique, rank, nullptr);
}

EXPORT int ncclCommGetAsyncError(ncclComm* handle, int* state) {
    if (handle == nullptr || state == nullptr) return INVALID_ARGUMENT;
    *state = handle->communicator->state();
    return SUCCESS;
}

EXPORT int ncclCommAbort(ncclComm* handle) {
    if (handle == nullptr) return SUCCESS;
    handle->communicator->abort();
    delete handle;
    return SUCCESS;
}

EXPORT int ncclCommFinalize(ncclComm* handle) {
    if (handle == nullptr) return INVALID_ARGUMENT;
    Communicator& communicator = *handle->communicator;
    if (!communicator.ready()) return INVALID_ARGUMENT;
    communicator.begin_operation();
    communicator.finalize();
    return communicator.blocking ? SUCCESS : IN_PROGRESS;
}

EXPORT int ncclCommDestroy(ncclComm* handle) {
    if (handle == nullptr) return SUCCESS;
    handle->communicator->wait_until_done();
    return ncclCommAbort(handle);
}

EXPORT int ncclCommCount(ncclComm* handle, int* ranks) {
    if (handle == nullptr) return INVALID_ARGUMENT;
    *ranks = handle->communicator->ranks;
    return SUCCESS;
}

EXPORT int ncclCommUserRank(ncclComm* handle, int* rank) {
    if (handle == nullptr) return INVALID_ARGUMENT;
    *rank = handle->communicator->rank;
    return SUCCESS;
}

EXPORT int ncclCommCuDevice(ncclComm* handle, int* device) {
    if (handle == nullptr) return INVALID_ARGUMENT;
    *device = handle->communicator->device;
    return SUCCESS;
}

// ---- operations ----

EXPORT int ncclGroupStart() { return start_group(); }
EXPORT int ncclGroupEnd() { return end_group(); }

EXPORT int ncclSend(const void* data, size_t count, int type, int peer, ncclComm* handle, void* stream) {
    if (type < 0 || type > 11) return INVALID_ARGUMENT;
    return add(handle, stream, {{true, peer, bytes_of(data), count * ELEMENT_BYTES[type]}});
}

EXPORT int ncclRecv(void* data, size_t count, int type, int peer, ncclComm* handle, void* stream) {
    if (type < 0 || type > 11) return INVALID_ARGUMENT;
    return add(handle, stream, {{false, peer, bytes_of(data), count * ELEMENT_BYTES[type]}});
}

EXPORT int ncclAllGather(const void* own, void* all, size_t count, int type, ncclComm* handle, void* stream) {
    if (handle == nullptr || type < 0 || type > 11) return INVALID_ARGUMENT;
    const size_t bytes = count * ELEMENT_BYTES[type];
    std::vector<Transfer> transfers;
    for (int peer = 0; peer < handle->communicator->ranks; peer++) {
        transfers.push_back({true, peer, bytes_of(own), bytes});
        transfers.push_back({false, peer, bytes_of(all) + bytes * static_cast<size_t>(peer), bytes});
    }
    return add(handle, stream, transfers);
}

EXPORT int ncclBroadcast(const void* from, void* to, size_t count, int type, int root, ncclComm* handle,
                         void* stream) {
    if (handle == nullptr || type < 0 || type > 11) return INVALID_ARGUMENT;
    const size_t bytes = count * ELEMENT_BYTES[type];
    std::vector<Transfer> transfers;
    if (handle->communicator->rank == root) {
        for (int peer = 0; peer < handle->communicator->ranks; peer++)
            transfers.push_back({true, peer, bytes_of(from), bytes});
    }
    transfers.push_back({false, root, bytes_of(to), bytes});
    return add(handle, stream, transfers);
}
EXPORT int ncclBcast(void* data, size_t count, int type, int root, ncclComm* handle, void* stream) {
    return ncclBroadcast(data, data, count, type, root, handle, stream);
}
