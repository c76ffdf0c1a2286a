// A communicator of libnccl, which connects its ranks and runs the sends and receives of groups.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <vector>

#include "nccl_socket.h"

namespace nccl {

enum Result : int {
    SUCCESS = 0,
    SYSTEM_ERROR = 2,
    INTERNAL_ERROR = 3,
    INVALID_ARGUMENT = 4,
    INVALID_USAGE = 5,
    REMOTE_ERROR = 6,
    IN_PROGRESS = 7,
};

// The version as NCCL encodes it: 23003 is 2.30.3.
int version();

// The contents of ncclUniqueId's 128 bytes: the port of the thread that introduces the ranks to
// each other.
struct Id {
    uint64_t magic, number;
    uint16_t port;
};
// Starts this thread in the calling process.
Result make_id(Id*);

struct Transfer {
    bool sends;
    int peer;
    char* data;
    size_t bytes;
};

class Communicator {
  public:
    Communicator(int rank, int ranks, int device, bool blocking);
    ~Communicator();

    const int rank, ranks, device;
    const bool blocking;

    // Connects to all ranks and sets the state. Returns when all are connected, or after an error.
    void connect(const Id&);
    // Returns the next number in the order of this communicator's groups.
    uint64_t issue();
    // Runs the transfers of the group with number `turn`, after all groups before it. Returns when
    // they are done. After an error it returns only when the communicator is aborted, as on a GPU.
    void transfer(uint64_t turn, std::vector<Transfer>);

    Result state();          // the result of ncclCommGetAsyncError
    bool ready();            // whether a new operation may be issued
    void begin_operation();  // a non-blocking communicator is in progress until its state is queried
    void finalize();         // the communicator is in progress until all groups are done
    void abort();            // ends running transfers, and returns when they have ended
    void wait_until_connected();
    void wait_until_done();  // waits until all issued groups are done or have failed

  private:
    std::mutex mutex;
    std::condition_variable changed;
    Result error = SUCCESS;
    bool connected = false, aborted = false, unasked = false, finalizing = false;
    uint64_t issued = 0, finished = 0, running = 0;
    int wake;  // event descriptor; readable after an abort
    std::vector<Socket> peers;

    Result introduce(const Id&);
    Result run(std::vector<Transfer>&);
};

}  // namespace nccl
