#!/usr/bin/env bash
# Installs what tests talk to into .rayloop/servers: moto (S3), Azurite (Azure), gcp-storage-emulator (Google Cloud
# Storage), Hadoop (HDFS), DuckDB. What is there already stays. Each Python server has an environment of its own, since
# boto3's pins conflict with the product's.
set -euo pipefail

root="$(cd "$(dirname "$0")/../.." && pwd)"
servers="${RAYLOOP_SERVERS:-$root/.rayloop/servers}"
python="${PYTHON:-python3}"
mkdir -p "$servers"

missing() { [ ! -e "$servers/$1/installed" ]; }
begin() { echo "installing $1 into $servers/$1" && rm -rf "${servers:?}/$1" && mkdir -p "$servers/$1"; }
done_() { touch "$servers/$1/installed"; }

if missing s3; then
	begin s3
	"$python" -m venv "$servers/s3/venv"
	"$servers/s3/venv/bin/pip" install --quiet 'moto[server]==5.2.2'
	done_ s3
fi

if missing gcs; then
	begin gcs
	"$python" -m venv "$servers/gcs/venv"
	"$servers/gcs/venv/bin/pip" install --quiet 'gcp-storage-emulator==2026.7.19'
	done_ gcs
fi

if missing azure; then
	if command -v npm >/dev/null; then
		begin azure
		npm install --silent --no-fund --no-audit --prefix "$servers/azure" 'azurite@3.35.0' >/dev/null
		done_ azure
	else
		echo "no Azure server: npm is missing (apt-get install npm)" >&2
	fi
fi

if missing hdfs; then
	if command -v java >/dev/null; then
		begin hdfs
		# Hadoop 2.7.3 comes inside this PySpark; 40 MB of its jars are kept.
		"$python" -m venv "$servers/hdfs/venv"
		"$servers/hdfs/venv/bin/pip" install --quiet 'setuptools<81' wheel
		"$servers/hdfs/venv/bin/pip" download --quiet --no-deps --no-build-isolation --no-binary :all: \
			--dest "$servers/hdfs" 'pyspark==2.4.8'
		mkdir "$servers/hdfs/jars"
		tar -xzf "$servers/hdfs/pyspark-2.4.8.tar.gz" -C "$servers/hdfs/jars" --strip-components 3 --wildcards \
			'*/deps/jars/'{hadoop-,commons-,jetty,javax.,jersey,htrace,protobuf,xerces,guava,slf4j,log4j,netty,leveldbjni,xmlenc,jackson,jsr305}'*'
		rm -rf "$servers/hdfs/pyspark-2.4.8.tar.gz" "$servers/hdfs/venv"
		done_ hdfs
	else
		echo "no HDFS server: Java is missing (apt-get install default-jre-headless)" >&2
	fi
fi

# No server, but an engine with an environment of its own: the version of DuckDB whose Iceberg reader is on PyPI.
if missing duckdb; then
	begin duckdb
	"$python" -m venv "$servers/duckdb/venv"
	"$servers/duckdb/venv/bin/pip" install --quiet 'duckdb==1.5.5' 'duckdb-extension-avro==1.5.5' 'duckdb-extension-iceberg==1.5.5'
	done_ duckdb
fi
