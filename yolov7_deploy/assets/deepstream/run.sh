#!/bin/sh
# Detects and tracks in 1 to @STREAMS@ streams:  sh run.sh rtsp://CAMERA [rtsp://CAMERA ...]
# A file is file:///PATH. SINK is the last element; SINK='fakesink sync=0' shows nothing, Jetson has SINK='nv3dsink sync=0'.
set -eu
if [ $# -lt 1 ] || [ $# -gt @STREAMS@ ]; then
  echo "usage: sh run.sh rtsp://CAMERA ..., 1 to @STREAMS@ streams; for more:  y7 deepstream --streams N" >&2
  exit 2
fi
folder=$(cd "$(dirname "$0")" && pwd)
if [ ! -e "$folder/libyolov7_parser.so" ]; then
  echo "The parser is not compiled yet:  make -C $folder" >&2
  exit 1
fi

streams=$#
columns=1
while [ $((columns * columns)) -lt "$streams" ]; do columns=$((columns + 1)); done
number=0
for uri; do
  set -- "$@" nvurisrcbin "uri=$uri" "!" queue "!" "mux.sink_$number"
  shift
  number=$((number + 1))
done
tracker=/opt/nvidia/deepstream/deepstream/lib/libnvds_nvmultiobjecttracker.so

# shellcheck disable=SC2086
exec gst-launch-1.0 -e \
  nvstreammux name=mux "batch-size=$streams" width=1920 height=1080 live-source=1 batched-push-timeout=40000 "!" \
  nvinfer "config-file-path=$folder/config_infer.txt" "!" \
  nvtracker "ll-lib-file=$tracker" "ll-config-file=$folder/config_tracker.yml" "!" \
  nvmultistreamtiler "rows=$(((streams + columns - 1) / columns))" "columns=$columns" width=1920 height=1080 "!" \
  nvvideoconvert "!" nvdsosd "!" ${SINK:-nveglglessink sync=0} \
  "$@"
