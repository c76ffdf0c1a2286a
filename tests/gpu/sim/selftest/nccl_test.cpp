// Tests of NCCL between three processes: exchanges, a rank that is killed, a rank that never
// connects.
#include <csignal>
#include <cstring>
#include <future>
#include <thread>

#include "api.h"

namespace {

constexpr int RANKS = 3, FLOAT32 = 7, REMOTE_ERROR = 6, IN_PROGRESS = 7;

std::string hex(const UniqueId& id) {
    std::string text;
    char digits[3];
    for (const char byte : id.bytes)
        snprintf(digits, sizeof digits, "%02x", static_cast<unsigned char>(byte)), text += digits;
    return text;
}

UniqueId id_of(const std::string& text) {
    UniqueId id;
    for (size_t i = 0; i < sizeof id.bytes; i++)
        id.bytes[i] = static_cast<char>(std::stoi(text.substr(2 * i, 2), nullptr, 16));
    return id;
}

int state(void* communicator) {
    int state;
    OK(ncclCommGetAsyncError(communicator, &state));
    return state;
}

int wait_while_in_progress(void* communicator) {
    int now;
    while ((now = state(communicator)) == IN_PROGRESS) std::this_thread::yield();
    return now;
}

void* connect(const UniqueId& id, int rank, int* result) {
    void* communicator;
    NcclConfig config{sizeof(NcclConfig), 0xcafebeef, 23003, 0};
    EQUAL(ncclCommInitRankConfig(&communicator, RANKS, id, rank, &config), IN_PROGRESS);
    *result = wait_while_in_progress(communicator);
    return communicator;
}

// Every rank sends to every rank, including itself, in one group. The messages are larger than the
// buffers of the sockets.
void exchange(void* communicator, int rank, void* stream) {
    const size_t most = 1 << 20;
    const auto value = [](int from, int to, size_t i) {
        return static_cast<float>((from * 10 + to) * 1000000 + static_cast<int>(i % 999));
    };
    std::vector<float> source(RANKS * most);
    for (int peer = 0; peer < RANKS; peer++) {
        for (size_t i = 0; i < most; i++) source[static_cast<size_t>(peer) * most + i] = value(rank, peer, i);
    }
    const Buffer out(source), in(RANKS * most * 4);
    const auto count = [](int from, int to) { return static_cast<size_t>((1 << 20) - from * 1000 - to); };
    OK(cuCtxSynchronize());
    void* done;
    OK(cuEventCreate(&done, 2));
    OK(ncclGroupStart());
    for (int peer = 0; peer < RANKS; peer++) {
        const size_t from = static_cast<size_t>(peer) * most;
        OK(ncclSend(out.as<float>() + from, count(rank, peer), FLOAT32, peer, communicator, stream));
        OK(ncclRecv(in.as<float>() + from, count(peer, rank), FLOAT32, peer, communicator, stream));
    }
    EQUAL(ncclGroupEnd(), IN_PROGRESS);
    fprintf(stderr, "(expected error) ");
    EQUAL(ncclSend(out.as<float>(), 1, FLOAT32, 0, communicator, stream), 4);
    EQUAL(wait_while_in_progress(communicator), 0);
    OK(cuEventRecord(done, stream));
    OK(cuEventSynchronize(done));
    OK(cuEventDestroy_v2(done));
    const auto received = in.read<float>();
    for (int peer = 0; peer < RANKS; peer++) {
        for (size_t i = 0; i < most; i++) {
            const float is = received[static_cast<size_t>(peer) * most + i];
            CHECK(i < count(peer, rank) ? is == value(peer, rank, i) : std::isnan(is));
        }
    }
}

void collectives(void* communicator, int rank, void* stream) {
    const Buffer own(std::vector<float>(100, static_cast<float>(rank))), all(RANKS * 400), target(400);
    OK(cuCtxSynchronize());
    EQUAL(ncclAllGather(own.as<void>(), all.as<void>(), 100, FLOAT32, communicator, stream), IN_PROGRESS);
    EQUAL(wait_while_in_progress(communicator), 0);
    EQUAL(ncclBroadcast(own.as<void>(), target.as<void>(), 100, FLOAT32, 1, communicator, stream),
          IN_PROGRESS);
    EQUAL(wait_while_in_progress(communicator), 0);
    OK(cuStreamSynchronize(stream));
    const auto gathered = all.read<float>(), broadcast = target.read<float>();
    for (size_t i = 0; i < gathered.size(); i++) CHECK(gathered[i] == static_cast<float>(i / 100));
    for (const float value : broadcast) CHECK(value == 1.0f);
}

// Operations of one communicator run in the order of their calls, also on different streams.
void two_streams(void* communicator, int rank, void* stream) {
    const Buffer first(std::vector<float>(10, 1.0f)), second(std::vector<float>(10, 2.0f));
    OK(cuCtxSynchronize());
    if (rank == 0) {
        void* other;
        OK(cuStreamCreate(&other, 1));
        std::promise<void> gate;
        const auto pass = [](void* gate) { static_cast<std::promise<void>*>(gate)->get_future().wait(); };
        OK(cuLaunchHostFunc(stream, pass, &gate));
        EQUAL(ncclSend(first.as<void>(), 10, FLOAT32, 1, communicator, stream), IN_PROGRESS);
        EQUAL(wait_while_in_progress(communicator), 0);
        EQUAL(ncclSend(second.as<void>(), 10, FLOAT32, 1, communicator, other), IN_PROGRESS);
        EQUAL(wait_while_in_progress(communicator), 0);
        EQUAL(cuStreamQuery(other), 600);
        gate.set_value();
        OK(cuStreamSynchronize(other));
        OK(cuStreamDestroy_v2(other));
    } else if (rank == 1) {
        for (const Buffer* to : {&second, &first}) {
            EQUAL(ncclRecv(to->as<void>(), 10, FLOAT32, 0, communicator, stream), IN_PROGRESS);
            EQUAL(wait_while_in_progress(communicator), 0);
        }
        OK(cuStreamSynchronize(stream));
        CHECK(second.read<float>()[9] == 1.0f && first.read<float>()[9] == 2.0f);
    }
}

int exchange_scene(const UniqueId& id, int rank) {
    int result, number;
    void *communicator = connect(id, rank, &result), *stream;
    OK(result);
    OK(ncclCommCount(communicator, &number));
    EQUAL(number, RANKS);
    OK(ncclCommUserRank(communicator, &number));
    EQUAL(number, rank);
    OK(cuStreamCreate(&stream, 1));
    exchange(communicator, rank, stream);
    collectives(communicator, rank, stream);
    two_streams(communicator, rank, stream);
    EQUAL(ncclCommFinalize(communicator), IN_PROGRESS);
    EQUAL(wait_while_in_progress(communicator), 0);
    OK(ncclCommDestroy(communicator));
    OK(cuStreamDestroy_v2(stream));
    return 0;
}

// Rank 2 is killed before its operation.
int killed_scene(const UniqueId& id, int rank) {
    int result;
    void *communicator = connect(id, rank, &result), *stream, *done;
    OK(result);
    if (rank == 2) raise(SIGKILL);
    OK(cuStreamCreate(&stream, 1));
    OK(cuEventCreate(&done, 2));
    const Buffer x(std::vector<float>(100));
    OK(cuCtxSynchronize());
    EQUAL(ncclRecv(x.as<void>(), 100, FLOAT32, 2, communicator, stream), IN_PROGRESS);
    OK(cuEventRecord(done, stream));
    const bool hangs = getenv("LORA_SIM_NCCL_HANG") != nullptr;
    const auto deadline = std::chrono::steady_clock::now() +
                          (hangs ? std::chrono::milliseconds(200) : std::chrono::seconds(20));
    while (std::chrono::steady_clock::now() < deadline && (result = state(communicator)) != REMOTE_ERROR)
        std::this_thread::yield();
    EQUAL(result, hangs ? 0 : REMOTE_ERROR);
    EQUAL(cuEventQuery(done), 600);  // the stream waits until the communicator is aborted
    OK(ncclCommAbort(communicator));
    OK(cuEventSynchronize(done));
    return 0;
}

int missing_scene(const UniqueId& id, int rank) {
    void* communicator;
    NcclConfig config{sizeof(NcclConfig), 0xcafebeef, 23003, 0};
    EQUAL(ncclCommInitRankConfig(&communicator, RANKS, id, rank, &config), IN_PROGRESS);
    EQUAL(state(communicator), IN_PROGRESS);
    OK(ncclCommAbort(communicator));
    return 0;
}

int duplicate_scene(const UniqueId& id, int rank) {
    int result;
    void* communicator = connect(id, rank, &result);
    EQUAL(result, 5);
    OK(ncclCommAbort(communicator));
    return 0;
}

int refused_scene(const UniqueId& id, int rank) {
    int result;
    void* communicator = connect(id, rank, &result);
    EQUAL(result, 2);
    OK(ncclCommAbort(communicator));
    return 0;
}

// The sender and the receiver of a message have different sizes.
int mismatch_scene(const UniqueId& id, int rank) {
    int result;
    void* communicator = connect(id, rank, &result);
    OK(result);
    const Buffer x(std::vector<float>(100));
    void* stream;
    OK(cuStreamCreate(&stream, 1));
    OK(cuCtxSynchronize());
    if (rank == 0) EQUAL(ncclSend(x.as<void>(), 99, FLOAT32, 1, communicator, stream), IN_PROGRESS);
    if (rank == 1) EQUAL(ncclRecv(x.as<void>(), 100, FLOAT32, 0, communicator, stream), IN_PROGRESS);
    if (rank == 1)
        while ((result = state(communicator)) == 0 || result == IN_PROGRESS) std::this_thread::yield();
    EQUAL(result, rank == 1 ? 3 : 0);
    if (rank == 0) OK(cuStreamSynchronize(stream));
    OK(ncclCommAbort(communicator));
    return 0;
}

// Runs a scene in `ranks` processes and returns their exit codes. In each process, a variable with
// the value RANK is set to the rank.
std::vector<int> run_ranks(const char* scene, int ranks, bool one_device,
                           const std::vector<std::pair<std::string, std::string>>& environment = {}) {
    UniqueId id;
    OK(ncclGetUniqueId(&id));
    std::vector<std::future<Ending>> endings;
    for (int rank = 0; rank < ranks; rank++) {
        const std::vector<std::string> arguments = {"nccl", scene, hex(id), std::to_string(rank),
                                                    std::to_string(one_device ? 0 : rank)};
        auto variables = environment;
        for (auto& [name, value] : variables) {
            if (value == "RANK") value = std::to_string(rank);
        }
        endings.push_back(std::async(std::launch::async, [=] { return run_scene(arguments, variables); }));
    }
    std::vector<int> codes;
    for (auto& ending : endings) {
        const Ending ended = ending.get();
        if (ended.code != 0 && ended.code != -SIGKILL) fprintf(stderr, "%s: %s", scene, ended.said.c_str());
        codes.push_back(ended.code);
    }
    return codes;
}

}  // namespace

void test_nccl() {
    int version;
    OK(ncclGetVersion(&version));
    EQUAL(version, 23003);
    CHECK(run_ranks("exchange", RANKS, false) == std::vector<int>(3, 0));
    CHECK(run_ranks("exchange", RANKS, true, {{"NCCL_MULTI_RANK_GPU_ENABLE", "1"}}) ==
          std::vector<int>(3, 0));
    CHECK(run_ranks("exchange", RANKS, false, {{"LORA_SIM_LATE", "1"}}) == std::vector<int>(3, 0));
    CHECK(run_ranks("duplicate", RANKS, true) == std::vector<int>(3, 0));
    const std::pair<std::string, std::string> old = {"LORA_SIM_NCCL_VERSION", "22809"},
                                              shared = {"NCCL_MULTI_RANK_GPU_ENABLE", "1"};
    CHECK(run_ranks("duplicate", RANKS, true, {old, shared}) == std::vector<int>(3, 0));
    CHECK(run_ranks("duplicate", RANKS, true, {old, {"NCCL_HOSTID", "node"}}) == std::vector<int>(3, 0));
    CHECK(run_ranks("exchange", RANKS, true, {old, {"NCCL_HOSTID", "RANK"}}) == std::vector<int>(3, 0));
    CHECK(run_ranks("refused", RANKS, false, {{"LORA_SIM_NCCL_REFUSE", "1"}}) == std::vector<int>(3, 0));
    CHECK(run_ranks("killed", RANKS, false) == (std::vector<int>{0, 0, -SIGKILL}));
    CHECK(run_ranks("killed", RANKS, false, {{"LORA_SIM_NCCL_HANG", "1"}}) ==
          (std::vector<int>{0, 0, -SIGKILL}));
    CHECK(run_ranks("missing", 2, false) == std::vector<int>(2, 0));
    CHECK(run_ranks("mismatch", RANKS, false) == std::vector<int>(3, 0));
}

int nccl_scene(const std::vector<std::string>& arguments) {
    CHECK(arguments.size() == 5);
    const std::string& scene = arguments[1];
    const UniqueId id = id_of(arguments[2]);
    const int rank = std::stoi(arguments[3]);
    use_device(std::stoi(arguments[4]));
    if (scene == "exchange") return exchange_scene(id, rank);
    if (scene == "killed") return killed_scene(id, rank);
    if (scene == "missing") return missing_scene(id, rank);
    if (scene == "duplicate") return duplicate_scene(id, rank);
    if (scene == "refused") return refused_scene(id, rank);
    if (scene == "mismatch") return mismatch_scene(id, rank);
    return 2;
}
