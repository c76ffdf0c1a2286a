// A communicator of libnccl: how its ranks find each other, and how a group's sends and receives are done.
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

// As NCCL counts: 23003 is 2.30.3.
int version();

// What ncclUniqueId's 128 bytes hold: where the thread listens that introduces the ranks to each other.
struct Id {
    uint64_t magic, number;
    uint16_t port;
};
// Starts that thread, in the calling process.
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

    // Connects with all ranks; returns when done, and sets the state.
    void connect(const Id&);
    // Takes a place in the order of this communicator's groups, and does a group's transfers in its turn. Returns when done. After an error,
    // as on a GPU, it returns only when the communicator is aborted.
    uint64_t issue();
    void transfer(uint64_t turn, std::vector<Transfer>);

    Result state();              // what ncclCommGetAsyncError says
    bool ready();                // whether a new operation may be issued
    void begin_operation();      // not blocking: in progress until the state was asked for
    void finalize();             // in progress until all groups are done
    void abort();                // ends transfers that run; returns when they have
    void wait_until_connected();
    void wait_until_done();      // until all groups issued are done, or failed

  private:
    std::mutex mutex;
    std::condition_variable changed;
    Result error = SUCCESS;
    bool connected = false, aborted = false, unasked = false, finalizing = false;
    uint64_t issued = 0, finished = 0, running = 0;
    int wake;                    // readable once aborted
    std::vector<Socket> peers;

    Result introduce(const Id&);
    Result run(std::vector<Transfer>&);
};

}  // namespace nccl
