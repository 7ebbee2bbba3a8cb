package org.sealwright.edge.android;

import java.io.ByteArrayOutputStream;
import java.io.IOException;
import java.io.InputStream;
import java.security.GeneralSecurityException;
import java.security.cert.X509Certificate;
import java.time.Duration;
import java.util.HashMap;
import java.util.Locale;
import java.util.Map;
import javax.net.ssl.SSLContext;
import javax.net.ssl.TrustManager;
import javax.net.ssl.X509TrustManager;
import okhttp3.OkHttpClient;
import okhttp3.Request;
import okhttp3.RequestBody;
import okhttp3.ResponseBody;
import org.sealwright.edge.Transport;

/** OkHttp, to whoever answers at the gateways' address: what comes over it verifies itself. */
public final class OkHttpTransport implements Transport {
    private static final Duration TIMEOUT = Duration.ofSeconds(30);
    private static final Duration CALL_TIMEOUT = Duration.ofMinutes(10);
    private final String address;
    private final OkHttpClient client;

    public OkHttpTransport(String address) {
        if (!address.startsWith("https://")) throw new IllegalArgumentException("the gateways' address is no https URL");
        this.address = address;
        X509TrustManager anybody = new Anybody();
        try {
            SSLContext tls = SSLContext.getInstance("TLS");
            tls.init(null, new TrustManager[] {anybody}, null);
            client = new OkHttpClient.Builder()
                    .sslSocketFactory(tls.getSocketFactory(), anybody)
                    .hostnameVerifier((name, session) -> true)
                    .followRedirects(false)
                    .connectTimeout(TIMEOUT)
                    .readTimeout(TIMEOUT)
                    .writeTimeout(TIMEOUT)
                    .callTimeout(CALL_TIMEOUT)
                    .build();
        } catch (GeneralSecurityException error) {
            throw new IllegalStateException(error);
        }
    }

    @Override
    public Response call(String method, String path, Map<String, String> headers, byte[] body, long limit)
            throws IOException {
        Request.Builder request = new Request.Builder().url(address + path);
        headers.forEach(request::header);
        request.header("Accept-Encoding", "identity");
        request.method(method, body == null ? null : RequestBody.create(body));
        try (okhttp3.Response answer = client.newCall(request.build()).execute(); ResponseBody content = answer.body()) {
            Map<String, String> told = new HashMap<>();
            for (String name : answer.headers().names()) told.put(name.toLowerCase(Locale.ROOT), answer.header(name));
            ByteArrayOutputStream read = new ByteArrayOutputStream();
            boolean whole = content == null || read(content.byteStream(), read, limit);
            if (read.size() > limit) throw new IOException("the answer is too long");
            return new Response(answer.code(), told, read.toByteArray(), whole);
        }
    }

    /** Whether it came to its end, or to more than {@code limit}. */
    private static boolean read(InputStream stream, ByteArrayOutputStream into, long limit) {
        byte[] piece = new byte[1 << 16];
        try {
            for (int count; (count = stream.read(piece)) >= 0; ) {
                into.write(piece, 0, count);
                if (into.size() > limit) break;
            }
            return true;
        } catch (IOException error) {
            return false;
        }
    }

    @SuppressWarnings("CustomX509TrustManager") // the gateway proves itself by its EARs, not by a certificate
    private static final class Anybody implements X509TrustManager {
        @Override
        public void checkClientTrusted(X509Certificate[] chain, String type) {}

        @Override
        public void checkServerTrusted(X509Certificate[] chain, String type) {}

        @Override
        public X509Certificate[] getAcceptedIssuers() { return new X509Certificate[0]; }
    }
}
