//! The environment in which NCCL takes several processes on one GPU.

/// NCCL's variables for a group in which processes share a GPU, for the process `index`, with their
/// values. They work with every version of NCCL 2.
///
/// NCCL refuses two ranks that are on one host and one GPU. It treats ranks with different
/// `NCCL_HOSTID` as ranks on different hosts and connects them over a network. That network is TCP
/// over the loopback interface by `NCCL_NET` and `NCCL_SOCKET_IFNAME`: without `NCCL_NET`, NCCL
/// prefers network plugins and InfiniBand to sockets, and the interface only affects sockets.
///
/// `is_set` returns whether the environment has a variable. A network or an interface that is set
/// there is kept. `NCCL_MULTI_RANK_GPU_ENABLE`, with which NCCL 2.30 allows ranks of one host to share
/// a GPU, makes no difference.
pub fn shared_gpu_variables(index: usize, is_set: impl Fn(&str) -> bool) -> Vec<(&'static str, String)> {
    // All processes inherit the same NCCL_HOSTID, so the environment's is of no use.
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
    fn each_process_is_a_host_of_its_own_on_the_loopback_network() {
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
