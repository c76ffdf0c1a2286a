#include "nccl_communicator.h"

#include <sys/eventfd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string_view>
#include <thread>

namespace nccl {

namespace {

constexpr uint64_t MAGIC = 0x73696d6e63636c31;

struct Hello {
    uint64_t number, host;
    int rank, ranks, device;
    uint16_t port;
};

struct Header {
    uint64_t magic, bytes;
};

bool is_on(const char* variable) {
    const char* text = getenv(variable);
    return text != nullptr && *text == '1';
}

bool hangs() { return is_on("LORA_SIM_NCCL_HANG"); }

// All processes are on one machine, so their hosts differ only if NCCL_HOSTID differs.
uint64_t host_hash() {
    const char* id = getenv("NCCL_HOSTID");
    return id == nullptr ? 0 : std::hash<std::string_view>{}(std::string_view(id).substr(0, 1023)) | 1;
}

// Ranks of one host may share a device only with a variable that newer versions support.
bool may_share_device() { return version() >= 23000 && is_on("NCCL_MULTI_RANK_GPU_ENABLE"); }

// Waits until all ranks have sent a Hello, and sends all of them to every rank. A rank that
// disconnects before that may connect again.
void introduce_ranks(Socket listener, uint64_t number) {
    std::map<int, std::pair<Socket, Hello>> present;
    int ranks = -1;
    while (ranks < 0 || present.size() < static_cast<size_t>(ranks)) {
        std::vector<pollfd> descriptors = {{listener.get(), POLLIN, 0}};
        std::vector<int> whose = {-1};
        for (const auto& [rank, one] : present) {
            descriptors.push_back({one.first.get(), POLLIN, 0});
            whose.push_back(rank);
        }
        poll(descriptors.data(), descriptors.size(), -1);
        for (size_t i = 1; i < descriptors.size(); i++) {
            if (descriptors[i].revents != 0)
                present.erase(whose[i]);  // ranks send nothing else: this one disconnected
        }
        if (descriptors[0].revents == 0) continue;
        Socket connection;
        Hello hello;
        if (accept_from(listener, &connection, -1) != Outcome::done) return;
        if (receive_all(connection, &hello, sizeof hello, -1) != Outcome::done || hello.number != number)
            continue;
        if (ranks >= 0 && hello.ranks != ranks)
            fprintf(stderr, "simulated NCCL: ranks have different numbers of ranks: %d and %d\n", ranks,
                    hello.ranks);
        ranks = hello.ranks;
        present[hello.rank] = {std::move(connection), hello};
    }
    std::vector<Hello> table;
    for (const auto& [rank, one] : present) table.push_back(one.second);
    for (const auto& [rank, one] : present)
        send_all(one.first, table.data(), table.size() * sizeof(Hello), -1);
}

}  // namespace

int version() {
    const char* text = getenv("LORA_SIM_NCCL_VERSION");
    return text == nullptr ? 23003 : atoi(text);
}

// NCCL writes its version to stdout if NCCL_DEBUG has any value.
void log_version() {
    if (getenv("NCCL_DEBUG") == nullptr) return;
    printf("NCCL version %d.%d.%d, simulated\n", version() / 10000, version() / 100 % 100, version() % 100);
    fflush(stdout);
}

Result make_id(Id* id) {
    log_version();
    Socket listener = listen_on_loopback(&id->port);
    if (!listener.open()) return SYSTEM_ERROR;
    id->magic = MAGIC;
    id->number = static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count()) ^
                 static_cast<uint64_t>(getpid()) << 40;
    // The thread ends when it has introduced the ranks to each other.
    std::thread(introduce_ranks, std::move(listener), id->number).detach();
    return SUCCESS;
}

Communicator::Communicator(int rank, int ranks, int device, bool blocking)
    : rank(rank),
      ranks(ranks),
      device(device),
      blocking(blocking),
      wake(eventfd(0, EFD_CLOEXEC)),
      peers(static_cast<size_t>(ranks)) {}

Communicator::~Communicator() { close(wake); }

void Communicator::connect(const Id& id) {
    const Result result = introduce(id);
    std::unique_lock lock(mutex);
    if (result == REMOTE_ERROR && hangs()) changed.wait(lock, [this] { return aborted; });
    connected = true;
    error = result;
    changed.notify_all();
}

Result Communicator::introduce(const Id& id) {
    if (id.magic != MAGIC) return INVALID_ARGUMENT;
    if (is_on("LORA_SIM_NCCL_REFUSE")) return SYSTEM_ERROR;
    Hello hello = {id.number, host_hash(), rank, ranks, device, 0};
    const Socket listener = listen_on_loopback(&hello.port);
    const Socket root = connect_to_loopback(id.port);
    if (!listener.open()) return SYSTEM_ERROR;
    std::vector<Hello> table(static_cast<size_t>(ranks));
    if (!root.open() || send_all(root, &hello, sizeof hello, wake) != Outcome::done ||
        receive_all(root, table.data(), table.size() * sizeof(Hello), wake) != Outcome::done) {
        return REMOTE_ERROR;
    }
    for (const Hello& one : table) {
        for (const Hello& other : table) {
            if (one.rank == other.rank || one.device != other.device || one.host != other.host ||
                may_share_device())
                continue;
            fprintf(stderr, "simulated NCCL: duplicate GPU detected: ranks %d and %d both on device %d\n",
                    one.rank, other.rank, one.device);
            return INVALID_USAGE;
        }
    }
    for (int peer = 0; peer < rank; peer++) {
        Socket& connection = peers[static_cast<size_t>(peer)];
        connection = connect_to_loopback(table[static_cast<size_t>(peer)].port);
        if (!connection.open() || send_all(connection, &rank, sizeof rank, wake) != Outcome::done)
            return REMOTE_ERROR;
    }
    for (int missing = ranks - rank - 1; missing > 0; missing--) {
        Socket connection;
        int peer = -1;
        if (accept_from(listener, &connection, wake) != Outcome::done) return REMOTE_ERROR;
        if (receive_all(connection, &peer, sizeof peer, wake) != Outcome::done || peer <= rank ||
            peer >= ranks)
            return REMOTE_ERROR;
        peers[static_cast<size_t>(peer)] = std::move(connection);
    }
    return SUCCESS;
}

uint64_t Communicator::issue() {
    const std::lock_guard lock(mutex);
    return issued++;
}

void Communicator::transfer(uint64_t turn, std::vector<Transfer> transfers) {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return finished == turn || aborted; });
    if (error == SUCCESS && !aborted) {
        running++;
        lock.unlock();
        const Result result = run(transfers);
        lock.lock();
        running--;
        if (result != SUCCESS && !aborted && !(result == REMOTE_ERROR && hangs())) error = result;
        changed.notify_all();
        if (result != SUCCESS) changed.wait(lock, [this] { return aborted; });
    } else {
        changed.wait(lock, [this] { return aborted; });
    }
    finished++;
    changed.notify_all();
}

namespace {

// One direction of one connection, with its messages in order.
struct Lane {
    std::vector<Transfer*> messages;
    size_t current = 0;  // index of the current message
    size_t done = 0;     // bytes of its header and data that are done
    Header header{};

    bool finished() const { return current == messages.size(); }
};

// Sends or receives as many bytes as possible without waiting.
Result advance(const Socket& socket, Lane& lane, bool sends, int rank, int peer) {
    while (!lane.finished()) {
        Transfer& message = *lane.messages[lane.current];
        if (sends && lane.done == 0) lane.header = {MAGIC, message.bytes};
        const bool in_header = lane.done < sizeof(Header);
        char* const at = in_header ? reinterpret_cast<char*>(&lane.header) + lane.done
                                   : message.data + (lane.done - sizeof(Header));
        const size_t left =
            in_header ? sizeof(Header) - lane.done : message.bytes - (lane.done - sizeof(Header));
        if (left > 0) {
            const ssize_t moved = sends ? send_some(socket, at, left) : receive_some(socket, at, left);
            if (moved < 0) return REMOTE_ERROR;
            if (moved == 0) return SUCCESS;
            lane.done += static_cast<size_t>(moved);
        }
        if (!sends && in_header && lane.done == sizeof(Header) &&
            (lane.header.magic != MAGIC || lane.header.bytes != message.bytes)) {
            fprintf(stderr, "simulated NCCL: rank %d receives %zu bytes, but rank %d sends %llu\n", rank,
                    message.bytes, peer, static_cast<unsigned long long>(lane.header.bytes));
            return INTERNAL_ERROR;
        }
        if (lane.done == sizeof(Header) + message.bytes) lane.current++, lane.done = 0;
    }
    return SUCCESS;
}

}  // namespace

Result Communicator::run(std::vector<Transfer>& transfers) {
    struct Connection {
        Lane out, in;
    };
    std::vector<Connection> connections(static_cast<size_t>(ranks));
    for (Transfer& transfer : transfers) {
        Connection& connection = connections[static_cast<size_t>(transfer.peer)];
        (transfer.sends ? connection.out : connection.in).messages.push_back(&transfer);
    }
    Connection& own = connections[static_cast<size_t>(rank)];
    if (own.out.messages.size() != own.in.messages.size()) {
        fprintf(stderr, "simulated NCCL: rank %d sends %zu times to itself and receives %zu times\n", rank,
                own.out.messages.size(), own.in.messages.size());
        return INTERNAL_ERROR;
    }
    for (size_t i = 0; i < own.out.messages.size(); i++)
        memmove(own.in.messages[i]->data, own.out.messages[i]->data, own.in.messages[i]->bytes);
    for (;;) {
        std::vector<pollfd> descriptors = {{wake, POLLIN, 0}};
        for (int peer = 0; peer < ranks; peer++) {
            if (peer == rank) continue;
            Connection& connection = connections[static_cast<size_t>(peer)];
            const Socket& socket = peers[static_cast<size_t>(peer)];
            for (const bool sends : {true, false}) {
                const Result result =
                    advance(socket, sends ? connection.out : connection.in, sends, rank, peer);
                if (result != SUCCESS) return result;
            }
            const int events =
                (connection.out.finished() ? 0 : POLLOUT) | (connection.in.finished() ? 0 : POLLIN);
            if (events != 0) descriptors.push_back({socket.get(), static_cast<short>(events), 0});
        }
        if (descriptors.size() == 1) return SUCCESS;
        poll(descriptors.data(), descriptors.size(), -1);
        if (descriptors[0].revents != 0) return REMOTE_ERROR;  // aborted
    }
}

Result Communicator::state() {
    const std::lock_guard lock(mutex);
    if (error != SUCCESS) return error;
    if (!connected || (finalizing && finished != issued)) return IN_PROGRESS;
    if (unasked) {
        unasked = false;
        return IN_PROGRESS;
    }
    return SUCCESS;
}

bool Communicator::ready() {
    const std::lock_guard lock(mutex);
    return connected && !unasked;
}

void Communicator::begin_operation() {
    const std::lock_guard lock(mutex);
    unasked = !blocking;
}

void Communicator::finalize() {
    std::unique_lock lock(mutex);
    finalizing = true;
    if (blocking) changed.wait(lock, [this] { return finished == issued || error != SUCCESS; });
}

void Communicator::abort() {
    std::unique_lock lock(mutex);
    aborted = true;
    const uint64_t one = 1;
    if (write(wake, &one, sizeof one) < 0) perror("simulated NCCL: eventfd");
    changed.notify_all();
    changed.wait(lock, [this] { return running == 0; });
}

void Communicator::wait_until_connected() {
    std::unique_lock lock(mutex);
    changed.wait(lock, [this] { return connected; });
}

void Communicator::wait_until_done() {
    std::unique_lock lock(mutex);
    changed.wait(lock, [this] { return finished == issued || error != SUCCESS || aborted; });
}

}  // namespace nccl
