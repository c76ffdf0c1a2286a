// The simulation's own tests. `selftest` runs all of them. `selftest SCENE ARGS` runs the part of a
// test that needs its own process.
#include <poll.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>

#include "api.h"

extern char** environ;

void test_kernels();
void test_memory();
void test_streams();
void test_gemm();
void test_nccl();
int kernel_scene(const std::string& name);
int memory_scene(const std::string& name);
int stream_scene(const std::string& name);
int nccl_scene(const std::vector<std::string>& arguments);

Ending run_scene(const std::vector<std::string>& scene,
                 const std::vector<std::pair<std::string, std::string>>& environment) {
    int ends[2];
    CHECK(pipe(ends) == 0);
    std::vector<std::string> variables;
    for (char** variable = environ; *variable != nullptr; variable++) variables.push_back(*variable);
    for (const auto& [name, value] : environment) variables.insert(variables.begin(), name + "=" + value);
    std::vector<char*> arguments = {const_cast<char*>("selftest")}, values;
    for (const auto& argument : scene) arguments.push_back(const_cast<char*>(argument.c_str()));
    for (const auto& variable : variables) values.push_back(const_cast<char*>(variable.c_str()));
    arguments.push_back(nullptr);
    values.push_back(nullptr);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, ends[1], 2);
    posix_spawn_file_actions_addclose(&actions, ends[0]);
    pid_t child;
    CHECK(posix_spawn(&child, "/proc/self/exe", &actions, nullptr, arguments.data(), values.data()) == 0);
    posix_spawn_file_actions_destroy(&actions);
    close(ends[1]);
    Ending ending{0, ""};
    char part[4096];
    for (ssize_t bytes; (bytes = read(ends[0], part, sizeof part)) > 0;)
        ending.said.append(part, static_cast<size_t>(bytes));
    close(ends[0]);
    int status;
    CHECK(waitpid(child, &status, 0) == child);
    ending.code = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
    return ending;
}

int main(int count, char** values) {
    alarm(120);  // ends a test that hangs
    const std::vector<std::string> arguments(values + 1, values + count);
    if (!arguments.empty() && arguments[0] == "nccl") return nccl_scene(arguments);
    if (arguments.size() == 2 && arguments[0] == "kernel") return kernel_scene(arguments[1]);
    if (arguments.size() == 2 && arguments[0] == "memory") return memory_scene(arguments[1]);
    if (arguments.size() == 2 && arguments[0] == "stream") return stream_scene(arguments[1]);
    setenv("LORA_SIM_MEMORY", "256M", 0);
    setenv("LORA_SIM_GPUS", "3", 0);
    use_device();
    test_kernels();
    test_memory();
    test_streams();
    test_gemm();
    test_nccl();
    OK(cuCtxSynchronize());
    puts("the simulated GPU passes its tests");
}
