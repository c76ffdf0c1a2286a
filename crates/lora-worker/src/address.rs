//! The address at which other workers reach this one.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use tokio::net::{UdpSocket, lookup_host};
use tonic::transport::Uri;

/// The settings from which the peer address of this worker is derived.
#[derive(Debug, Clone)]
pub(crate) struct PeerAddress {
    /// `host:port`, if it is configured.
    pub(crate) advertised: Option<String>,
    /// The address that the worker listens on.
    pub(crate) listening: SocketAddr,
    /// The coordinator's URI.
    pub(crate) coordinator: Uri,
}

impl PeerAddress {
    /// Returns `host:port`: the configured address, or else the address listened on, or else, if
    /// that is unspecified, the address from which this host reaches the coordinator.
    pub(crate) async fn resolve(&self) -> io::Result<String> {
        if let Some(advertised) = &self.advertised {
            return Ok(advertised.clone());
        }
        let ip = self.listening.ip();
        let ip = if ip.is_unspecified() { self.outgoing().await? } else { ip };
        Ok(SocketAddr::new(ip, self.listening.port()).to_string())
    }

    /// The local address that the routing table chooses. Connecting a UDP socket sends nothing.
    async fn outgoing(&self) -> io::Result<IpAddr> {
        let host = self.coordinator.host().unwrap_or_default();
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let port = self.coordinator.port_u16().unwrap_or(80);
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the coordinator's name has no address");
        for address in lookup_host((host, port)).await? {
            let any: IpAddr = match address {
                SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
                SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
            };
            let socket = UdpSocket::bind((any, 0)).await?;
            match socket.connect(address).await {
                Ok(()) => return Ok(socket.local_addr()?.ip()),
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_peer_address_is_configured_or_listened_on_or_routed() {
        let mut address = PeerAddress {
            advertised: Some("worker-1:7410".into()),
            listening: ([10, 1, 2, 3], 7410).into(),
            coordinator: "http://127.0.0.1:7400".parse().unwrap(),
        };
        assert_eq!(address.resolve().await.unwrap(), "worker-1:7410");
        address.advertised = None;
        assert_eq!(address.resolve().await.unwrap(), "10.1.2.3:7410");
        address.listening = ([0, 0, 0, 0], 7411).into();
        assert_eq!(address.resolve().await.unwrap(), "127.0.0.1:7411");
    }
}
