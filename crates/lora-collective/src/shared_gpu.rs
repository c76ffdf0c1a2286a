//! The environment variables with which NCCL accepts several processes on one GPU.

/// Returns NCCL's variables and their values for process `index` of a group whose processes share a
/// GPU. They work with every version of NCCL 2.
///
/// NCCL refuses two ranks that are on one host and one GPU. It treats ranks with different
/// `NCCL_HOSTID` as ranks on different hosts and connects them over a network. `NCCL_NET` and
/// `NCCL_SOCKET_IFNAME` select TCP over the loopback interface: without `NCCL_NET`, NCCL prefers
/// network plugins and InfiniBand to sockets, and the interface only affects sockets.
///
/// `is_set` returns whether the environment has a variable. A network or an interface that the
/// environment sets is not overridden. `NCCL_MULTI_RANK_GPU_ENABLE`, with which NCCL 2.30 allows
/// ranks of one host to share a GPU, has no effect on the result.
pub fn shared_gpu_variables(index: usize, is_set: impl Fn(&str) -> bool) -> Vec<(&'static str, String)> {
    // All processes inherit the same NCCL_HOSTID, so the environment's value cannot be used.
    let host_id = ("NCCL_HOSTID", format!("shared-gpu-{index}"));
    let network = [("NCCL_NET", "Socket"), ("NCCL_SOCKET_IFNAME", "lo")];
    let unset = network.into_iter().filter(|(name, _)| !is_set(name));
    std::iter::once(host_id).chain(unset.map(|(name, value)| (name, value.to_owned()))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variables(index: usize, set: &[&str]) -> String {
        let variables = shared_gpu_variables(index, |name| set.contains(&name)).into_iter();
        variables.map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn each_process_has_its_own_host_id_and_uses_loopback() {
        let network = "NCCL_NET=Socket NCCL_SOCKET_IFNAME=lo";
        assert_eq!(variables(0, &[]), format!("NCCL_HOSTID=shared-gpu-0 {network}"));
        for ignored in ["NCCL_HOSTID", "NCCL_MULTI_RANK_GPU_ENABLE"] {
            assert_eq!(variables(1, &[ignored]), format!("NCCL_HOSTID=shared-gpu-1 {network}"));
        }
    }

    #[test]
    fn user_settings_are_not_overridden() {
        assert_eq!(variables(1, &["NCCL_SOCKET_IFNAME"]), "NCCL_HOSTID=shared-gpu-1 NCCL_NET=Socket");
        assert_eq!(variables(1, &["NCCL_NET"]), "NCCL_HOSTID=shared-gpu-1 NCCL_SOCKET_IFNAME=lo");
    }
}
