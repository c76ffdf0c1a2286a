"""A client that only needs the address of a coordinator, and gets services by server reflection."""

import hashlib

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

# Bytes of a chunk, which is the protocol's limit.
CHUNK = 1 << 20


class Service:
    """A gRPC service: its methods, and `message(name)` for the messages of its package."""

    def __init__(self, channel, pool, name):
        self._pool = pool
        self._descriptor = pool.FindServiceByName(name)
        for method in self._descriptor.methods:
            request, response = (
                "stream" if streaming else "unary"
                for streaming in (method.client_streaming, method.server_streaming)
            )
            call = getattr(channel, f"{request}_{response}")(
                f"/{name}/{method.name}",
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
            )
            setattr(self, method.name, call)

    def message(self, name):
        package = self._descriptor.file.package
        return message_factory.GetMessageClass(self._pool.FindMessageTypeByName(f"{package}.{name}"))


class Client:
    """The coordinator at `address`, as `host:port`."""

    def __init__(self, address):
        self.channel = grpc.insecure_channel(address)
        self._database = ProtoReflectionDescriptorDatabase(self.channel)
        self._pool = DescriptorPool(self._database)

    def services(self):
        return self._database.get_services()

    def service(self, name):
        return Service(self.channel, self._pool, name)

    def upload(self, path, name=None):
        """Uploads the file at `path` and returns its `StoredFile`."""
        artifacts = self.service("lora.v1.Artifacts")
        content = path.read_bytes()
        digest = {"size": len(content), "sha256": hashlib.sha256(content).digest()}
        request = artifacts.message("UploadRequest")

        def messages():
            yield request(header={"digest": digest})
            for start in range(0, len(content), CHUNK):
                yield request(chunk=content[start : start + CHUNK])

        artifacts.Upload(messages())
        return artifacts.message("StoredFile")(name=name or path.name, digest=digest)

    def download(self, job_id, name):
        """Downloads a file of a job's result and checks its hash."""
        artifacts = self.service("lora.v1.Artifacts")
        request = artifacts.message("DownloadRequest")(result={"job_id": job_id, "name": name})
        content, trailer = b"", None
        for message in artifacts.Download(request):
            content += message.chunk
            if message.HasField("trailer"):
                trailer = message.trailer
        assert trailer is not None and trailer.sha256 == hashlib.sha256(content).digest(), "corrupt file"
        return content
