// Loopback sockets for libnccl. Every wait also ends when an event descriptor (`wake`) becomes
// readable.
#pragma once

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <utility>

namespace nccl {

class Socket {
  public:
    Socket() = default;
    explicit Socket(int fd) : fd(fd) {}
    Socket(Socket&& other) noexcept : fd(std::exchange(other.fd, -1)) {}
    Socket& operator=(Socket&& other) noexcept {
        std::swap(fd, other.fd);
        return *this;
    }
    ~Socket() {
        if (fd >= 0) close(fd);
    }
    int get() const { return fd; }
    bool open() const { return fd >= 0; }

  private:
    int fd = -1;
};

inline void prepare(const Socket& socket) {
    const int yes = 1;
    setsockopt(socket.get(), IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    fcntl(socket.get(), F_SETFL, fcntl(socket.get(), F_GETFL) | O_NONBLOCK);
}

// Returns a listener on a free port. The socket is not open if the system refuses.
inline Socket listen_on_loopback(uint16_t* port) {
    Socket listener(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof address;
    auto* const raw = reinterpret_cast<sockaddr*>(&address);
    if (bind(listener.get(), raw, size) != 0 || listen(listener.get(), 128) != 0 ||
        getsockname(listener.get(), raw, &size) != 0)
        return {};
    prepare(listener);
    *port = ntohs(address.sin_port);
    return listener;
}

inline Socket connect_to_loopback(uint16_t port) {
    Socket connection(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    address.sin_port = htons(port);
    if (connect(connection.get(), reinterpret_cast<sockaddr*>(&address), sizeof address) != 0) return {};
    prepare(connection);
    return connection;
}

enum class Outcome { done, closed, woken };

inline Outcome wait_for(int fd, short events, int wake) {
    pollfd descriptors[] = {{fd, events, 0}, {wake, POLLIN, 0}};
    while (poll(descriptors, 2, -1) < 0 && errno == EINTR) {
    }
    return descriptors[1].revents != 0 ? Outcome::woken : Outcome::done;
}

inline Outcome accept_from(const Socket& listener, Socket* connection, int wake) {
    for (;;) {
        const int fd = accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC);
        if (fd >= 0) {
            *connection = Socket(fd);
            prepare(*connection);
            return Outcome::done;
        }
        if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED) return Outcome::closed;
        if (wait_for(listener.get(), POLLIN, wake) == Outcome::woken) return Outcome::woken;
    }
}

// Both functions return the number of bytes that were moved at once, 0 if none can be moved now, or
// -1 if the connection is closed.
inline ssize_t send_some(const Socket& socket, const void* data, size_t bytes) {
    const ssize_t sent = send(socket.get(), data, bytes, MSG_NOSIGNAL);
    return sent >= 0 ? sent : errno == EAGAIN || errno == EINTR ? 0 : -1;
}
inline ssize_t receive_some(const Socket& socket, void* data, size_t bytes) {
    const ssize_t received = recv(socket.get(), data, bytes, 0);
    return received > 0 ? received : received < 0 && (errno == EAGAIN || errno == EINTR) ? 0 : -1;
}

inline Outcome send_all(const Socket& socket, const void* data, size_t bytes, int wake) {
    for (const char* at = static_cast<const char*>(data); bytes > 0;) {
        const ssize_t sent = send_some(socket, at, bytes);
        if (sent < 0) return Outcome::closed;
        at += sent, bytes -= static_cast<size_t>(sent);
        if (sent == 0 && wait_for(socket.get(), POLLOUT, wake) == Outcome::woken) return Outcome::woken;
    }
    return Outcome::done;
}

inline Outcome receive_all(const Socket& socket, void* data, size_t bytes, int wake) {
    for (char* at = static_cast<char*>(data); bytes > 0;) {
        const ssize_t received = receive_some(socket, at, bytes);
        if (received < 0) return Outcome::closed;
        at += received, bytes -= static_cast<size_t>(received);
        if (received == 0 && wait_for(socket.get(), POLLIN, wake) == Outcome::woken) return Outcome::woken;
    }
    return Outcome::done;
}

}  // namespace nccl
