//! The environment in which NCCL takes several processes on one GPU.

/// NCCL's variables for a group in which processes share a GPU, for the process `index`, with their
/// values.
///
/// NCCL refuses two ranks that are on one host and one GPU. It treats ranks with different
/// `NCCL_HOSTID` as ranks on different hosts and connects them over the network: here by sockets
/// over the loopback device.
///
/// `is_set` returns whether the environment has a variable. A network interface that is set there is
/// kept. If `NCCL_MULTI_RANK_GPU_ENABLE` is set, with which NCCL 2.30 allows ranks of one host to
/// share a GPU, no variables are needed.
pub fn shared_gpu_variables(index: usize, is_set: impl Fn(&str) -> bool) -> Vec<(&'static str, String)> {
    if is_set("NCCL_MULTI_RANK_GPU_ENABLE") {
        return Vec::new();
    }
    // All processes inherit the same NCCL_HOSTID, so the environment's is of no use.
    let mut variables = vec![("NCCL_HOSTID", format!("shared-gpu-{index}"))];
    if !is_set("NCCL_SOCKET_IFNAME") {
        variables.push(("NCCL_SOCKET_IFNAME", "lo".to_owned()));
    }
    variables
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variables(index: usize, set: &[&str]) -> String {
        let variables = shared_gpu_variables(index, |name| set.contains(&name)).into_iter();
        variables.map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn each_process_is_a_host_of_its_own() {
        assert_eq!(variables(0, &[]), "NCCL_HOSTID=shared-gpu-0 NCCL_SOCKET_IFNAME=lo");
        assert_eq!(variables(1, &["NCCL_HOSTID"]), "NCCL_HOSTID=shared-gpu-1 NCCL_SOCKET_IFNAME=lo");
    }

    #[test]
    fn what_the_user_chose_stays() {
        assert_eq!(variables(1, &["NCCL_SOCKET_IFNAME"]), "NCCL_HOSTID=shared-gpu-1");
        assert_eq!(variables(1, &["NCCL_MULTI_RANK_GPU_ENABLE"]), "");
    }
}
